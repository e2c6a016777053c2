"""Conversions: a source of lazily loaded tensors on one side, a writer on the other, the mapping between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steps.engine.checkpoint import mapping, megatron
from steps.engine.checkpoint.fingerprint import Fingerprint
from steps.engine.checkpoint.hf import SHARD_BYTES, SIDE_FILES, Source, side_files, write_directory
from steps.engine.checkpoint.lazy import LazyTensors
from steps.engine.progress import SILENT, Progress
from steps.errors import ArtifactError
from steps.shapes import hf_config
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import MEGATRON_ROPE, model_config, run_config


@dataclass(frozen=True)
class Converted:
    """What was written. nbytes: of all tensors. fingerprint: base_fingerprint of the written model."""

    config: ModelConfig
    parameters: int
    nbytes: int
    fingerprint: str

    def facts(self) -> dict[str, Any]:
        """For the artifact's record."""
        return {
            "family": self.config.family,
            "dtype": self.config.params_dtype,
            "parameters": self.parameters,
            "model": self.config.to_dict(),
            "base_fingerprint": self.fingerprint,
        }

    def summary(self) -> dict[str, Any]:
        """For the person who waited."""
        return {
            "family": self.config.family,
            "dtype": self.config.params_dtype,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "fingerprint": self.fingerprint,
        }


def converted(config: ModelConfig, tensors: LazyTensors, fingerprint: str) -> Converted:
    """The account of a model that was written."""
    numel = sum(tensor.numel for tensor in tensors.values())
    return Converted(config, numel, sum(tensor.nbytes for tensor in tensors.values()), fingerprint)


def megatron_source(path: Path, iteration: int | None = None) -> Source:
    """Open a Megatron checkpoint as if it were a Hugging Face model: same names, shapes and bits.

    config.json and generation_config.json are those of the model it was converted from, where it keeps them; otherwise
    config.json is made from run_config.yaml. Raises ArtifactError for what is missing, damaged or not supported.
    """
    checkpoint = megatron.Checkpoint.open(path, iteration)
    config = model_config(checkpoint.run_config, str(checkpoint.folder / megatron.RUN_CONFIG))
    tensors = mapping.to_hf(config, checkpoint.tensors, str(checkpoint.folder))
    config = replace(config, params_dtype=next(iter(tensors.values())).dtype)
    files = _kept_files(checkpoint)
    if "config.json" not in files:
        files["config.json"] = json.dumps(hf_config.config_json(config), indent=2) + "\n"
    return Source(checkpoint.folder, config, tensors, files)


def _kept_files(checkpoint: megatron.Checkpoint) -> dict[str, str]:
    folder = checkpoint.hf_dir
    if folder is None:
        return {}
    return {name: (folder / name).read_text(encoding="utf-8") for name in SIDE_FILES if (folder / name).is_file()}


def hf_to_megatron(
    source: Source,
    directory: Path,
    save_tokenizer: Callable[[Path], None] | None = None,
    progress: Progress = SILENT,
) -> Converted:
    """Write a Hugging Face model as a Megatron checkpoint, iteration 0.

    save_tokenizer: called with the folder that the tokenizer's files go to; None for a model without one.
    """
    fingerprint = Fingerprint()
    tensors = mapping.to_megatron(source.config, fingerprint.watch(source.tensors), str(source.path))

    def beside(folder: Path) -> None:
        (folder / "hf").mkdir()
        for name, text in source.files.items():
            (folder / "hf" / name).write_text(text, encoding="utf-8")
        if save_tokenizer is not None:
            save_tokenizer(folder / "tokenizer")

    megatron.write(
        directory,
        tensors,
        num_layers=source.config.num_layers,
        run_config=run_config(source.config),
        beside=beside,
        progress=progress,
    )
    return converted(source.config, source.tensors, fingerprint.digest())


def to_hf_directory(
    source: Source, directory: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress = SILENT
) -> Converted:
    """Write any source (Megatron's, see `megatron_source`, or Hugging Face's) as a Hugging Face directory."""
    fingerprint = Fingerprint()
    write_directory(
        directory, fingerprint.watch(source.tensors), source.files, shard_bytes=shard_bytes, progress=progress
    )
    return converted(source.config, source.tensors, fingerprint.digest())


def megatron_differences(config: ModelConfig) -> list[str]:
    """What Megatron itself would compute differently from this model, for want of a setting. Usually nothing."""
    scaling = config.rope_scaling
    if scaling is None:
        return []
    return [
        f"Megatron-Core fixes rope_scaling.{key} at {value:g}; this model has {scaling[key]:g}"
        for key, value in MEGATRON_ROPE.items()
        if scaling.get(key, value) != value
    ]


def described_by(source: Source, model: str) -> tuple[Source, Path]:
    """The source with the config.json and generation_config.json of `model` (directory, .gguf or Hub id), and its path.

    Raises ArtifactError (base_model_mismatch) when that model has another shape.
    """
    path, files = side_files(model)
    data = json.loads(files["config.json"])
    dtype = source.config.params_dtype
    theirs = hf_config.model_config(data, str(path / "config.json"), dtype)
    mine, other = source.config.to_dict(), theirs.to_dict()
    if differing := [name for name in mine if mine[name] != other[name]]:
        shown = ", ".join(f"{name} {other[name]} instead of {mine[name]}" for name in differing[:4])
        raise ArtifactError(f"{model} is another model than {source.path}: {shown}", name="base_model_mismatch")
    if hf_config.stated_dtype(data) not in (None, dtype):
        files["config.json"] = json.dumps(hf_config.with_dtype(data, dtype), indent=2) + "\n"
    return replace(source, files=files), path
