"""A trained adapter on its base: what evaluation computes with, and what an export is held against."""

from __future__ import annotations

from typing import Any

from steps.engine.adapters.base import Adapters, Method, attach
from steps.engine.checkpoint.merge import Adapter
from steps.engine.model.decoder import Decoder
from steps.errors import ArtifactError


def attach_trained(decoder: Decoder, adapter: Adapter, method: Method[Any]) -> Adapters:
    """Put an opened adapter on its base; method: made of the adapter's section.

    Raises ArtifactError (damaged_artifact) for tensors that are not those of the method.
    """
    shared = {name: tensor.load() for name, tensor in adapter.shared.items()}
    tensors, names = {f"adapter.{name}": tensor for name, tensor in shared.items()}, []
    in_parts = type(method).factors is not Method.factors  # a method without a factor form adapts whole linears
    for linear, lazy in adapter.linears.items():
        loaded = {name: tensor.load() for name, tensor in lazy.items()}
        tensors |= {f"{linear}.adapter.{name}": tensor for name, tensor in loaded.items()}
        parent = linear.rpartition(".")[0]
        parts = method.factors(linear, loaded, shared) if in_parts else ("",)
        names += [f"{parent}.{part}" if part else linear for part in parts]
    trained = attach(decoder, method, names, 0)
    try:
        trained.load(tensors)
    except ValueError as error:
        what = f"{adapter.checkpoint.folder} is no {method.type} adapter as its settings describe it: {error}"
        raise ArtifactError(what, name="damaged_artifact") from error
    return trained
