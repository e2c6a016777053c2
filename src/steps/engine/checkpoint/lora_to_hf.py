"""checkpoint_lora to Hugging Face PEFT: from each linear's factors to the tensors of each Hugging Face module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from steps.engine.checkpoint.hf_adapter import HFAdapter, Update, uniform
from steps.engine.checkpoint.mapping import part_view
from steps.engine.checkpoint.merge import Adapter
from steps.errors import ArtifactError
from steps.shapes import targets
from steps.shapes.hf_adapter_config import config_json
from steps.shapes.model_config import ModelConfig


class Factored(Protocol):
    """scale * b @ a of a linear or a part of it, as an adapter method tells it: see adapters/base.py, Factors."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def magnitude(self) -> Tensor | None: ...
    def compact(self) -> Factored: ...


#: (linear's full name, its adapter's tensors, shared tensors) to its factors, by part.
FactorsOf = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Factored]]


def export(adapter: Adapter, factors: FactorsOf, model: ModelConfig, base: str | None) -> HFAdapter:
    """The adapter as peft and vLLM read it: one rank and one alpha for all modules, and no other settings.

    factors: the adapter method's.   base: what is written as base_model_name_or_path.
    Where all modules have one rank and one scale already, the factors stay as they are and the scale is told by
    lora_alpha; otherwise see `hf_adapter.uniform`. What adds nothing (AdaLoRA's pruned triplets) is left out before.
    The dtype is the stored one where it holds every value.
    Raises ArtifactError (damaged_artifact) for tensors that do not fit the model.
    """
    found = dict(_modules(adapter, factors, model))
    names = {targets.hf_name(name): name for name in targets.linear_names(model.num_layers, canonical=True)}
    for module, update in found.items():
        size = len(update.b), update.a.shape[1]
        if module not in names or size != targets.shape(model, names[module]):
            what = f"{adapter.checkpoint.folder} adapts {module} {list(size)}, which its own model does not have"
            raise ArtifactError(what, name="damaged_artifact")
    updates = uniform({module: found[module] for module in names if module in found})  # in the order of computation
    updates = _in_stored_dtype(adapter, updates)
    some = next(iter(updates.values()))
    lora_alpha, use_rslora = _alpha(adapter.section, some.rank, some.scale)
    config = config_json(
        r=some.rank,
        lora_alpha=lora_alpha,
        target_modules=targets.covering(list(updates), model.num_layers),
        use_dora=some.magnitude is not None,
        use_rslora=use_rslora,
        base=base,
    )
    return HFAdapter(config, updates)


def _modules(adapter: Adapter, factors: FactorsOf, model: ModelConfig) -> Iterator[tuple[str, Update]]:
    shared = {name: tensor.load() for name, tensor in adapter.shared.items()}
    for linear, tensors in adapter.linears.items():
        loaded = {name: tensor.load() for name, tensor in tensors.items()}
        try:
            for part, factored in factors(linear, loaded, shared).items():
                whole = f"{linear.rpartition('.')[0]}.{part}" if part else linear
                for name in targets.parts(whole):
                    # The factors of a part have that part's rows only; those of a whole fused linear have all.
                    last = "" if part else name.rpartition(".")[2]
                    yield targets.hf_name(name), _rows(model, last, factored.compact())
        except (KeyError, RuntimeError) as error:  # a tensor that is absent, or of a shape that cannot be taken apart
            if "memory" in str(error):
                raise
            what = f"the tensors of {linear} in {adapter.checkpoint.folder} do not fit its model: {error}"
            raise ArtifactError(what, name="damaged_artifact") from error


def _rows(model: ModelConfig, part: str, factors: Factored) -> Update:
    """The same A, and the part's own rows of B and of the magnitude."""
    b = part_view(model, part, factors.b.T).flatten(1).T  # by way of [r, groups, heads, D]; r may be 0
    magnitude = factors.magnitude
    if magnitude is not None:
        magnitude = part_view(model, part, magnitude).reshape(-1)
    return Update(factors.a, b, factors.scale, magnitude)


def _in_stored_dtype(adapter: Adapter, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Method.factors is float32: as stored, unless that would lose something (products, a scale folded in)."""
    stored = {tensor.dtype for tensors in adapter.linears.values() for tensor in tensors.values()}
    narrow = getattr(torch, stored.pop()) if stored in ({"bfloat16"}, {"float16"}) else torch.float32
    narrowed = {module: update.to(narrow) for module, update in updates.items()}
    same = all(
        torch.equal(tensor.float(), updates[module].tensors()[name])
        for module, update in narrowed.items()
        for name, tensor in update.tensors().items()
    )
    return narrowed if same else dict(updates)


def _alpha(section: Mapping[str, Any], rank: int, scale: float) -> tuple[float, bool]:
    """lora_alpha and use_rslora of which a reader makes `scale`: the settings' own where they do."""
    alpha, use_rslora = section.get("alpha"), bool(section.get("use_rslora"))
    if alpha is not None and alpha / (math.sqrt(rank) if use_rslora else rank) == scale:
        return float(alpha), use_rslora
    return scale * rank, False
