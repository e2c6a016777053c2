"""A model to be looked at: a base, with an adapter on it or without, computed as it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from steps.engine.adapters.base import create
from steps.engine.adapters.trained import attach_trained
from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.fingerprint import Fingerprint, verify, verify_trained_on
from steps.engine.checkpoint.hf import Source, open_source
from steps.engine.checkpoint.merge import Adapter, open_adapter
from steps.engine.model.decoder import Decoder
from steps.engine.progress import Progress
from steps.engine.train.bases import load_base
from steps.errors import ArtifactError


@dataclass(frozen=True)
class Asked:
    """Which model.

    megatron, hf: where the base is; one of the two, hf a directory, a .gguf file or a Hub id.   adapter: None for the
    base alone.   precision: as `train.precision`.
    base_fingerprint: what the base's record says of its weights;  trained_on: what the adapter's says; None: nothing.
    """

    megatron: Path | None
    hf: str | None
    adapter: Path | None
    precision: str
    base_fingerprint: str | None = None
    trained_on: str | None = None


@dataclass(frozen=True)
class Opened:
    """A model in memory, in evaluation mode. fingerprint: of its base."""

    decoder: Decoder
    source: Source
    fingerprint: str


def open_model(asked: Asked, progress: Progress) -> Opened:
    """Load a model as it was trained: on the GPU where there is one, a quantized base as the adapter saw it.

    Raises ArtifactError (base_model_mismatch, damaged_artifact, unsupported_model, unsupported_method).
    """
    source = megatron_source(asked.megatron) if asked.megatron is not None else open_source(str(asked.hf))
    adapter = None if asked.adapter is None else open_adapter(asked.adapter)
    return _load(source, adapter, asked, progress)


def _load(source: Source, adapter: Adapter | None, asked: Asked, progress: Progress) -> Opened:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = None if adapter is None else create(adapter.section, source.config)
    read = Fingerprint()
    weights = mapping.to_megatron(source.config, read.watch(source.tensors), str(source.path))
    section = None if method is None else method.section
    try:
        decoder = load_base(source.config, weights, progress, precision=asked.precision, device=device, section=section)
    except ValueError as error:
        raise ArtifactError(f"{source.path} cannot be loaded: {error}", name="damaged_artifact") from error
    fingerprint = read.digest()
    verify(fingerprint, asked.base_fingerprint, source.path)
    if adapter is not None and method is not None:
        verify_trained_on(fingerprint, asked.trained_on, source.path)
        attach_trained(decoder, adapter, method)
    return Opened(decoder.eval(), source, fingerprint)
