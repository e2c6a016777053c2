"""Canonical LoRA: A and B for each of q, k, v, gate and up by themselves, as Hugging Face models have them.

Megatron-Bridge's CanonicalLoRA. On a fused linear the factors are `adapter_q.linear_in.weight`, …, `adapter_up.…`; on
linear_proj and linear_fc2 they are LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from steps.config.peft.canonical_lora import CanonicalLoRA
from steps.engine.adapters.base import Adapter, Factors, Method, Target, register
from steps.engine.adapters.lora import LoRAAdapter, Pair
from steps.engine.adapters.starts import matrix
from steps.engine.checkpoint.mapping import part_view
from steps.engine.model.layers import Linear
from steps.shapes.targets import PART_ADAPTERS as NAMES
from steps.shapes.targets import shape

_PARTS = {name: part for part, name in NAMES.items()}


class PartsAdapter(Adapter):
    """Pairs of factors by Megatron-Bridge's names, each writing to its own outputs of a fused linear."""

    def __init__(self, method: CanonicalLoRAMethod, pairs: Mapping[str, Pair]) -> None:
        super().__init__()
        self._slots = {NAMES[part]: partial(part_view, method.model, part) for part in pairs}
        for part, pair in pairs.items():
            self.add_module(NAMES[part], pair)

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        out = linear.project(x)
        for name, slot in self._slots.items():
            out = self.get_submodule(name)(out, x, slot)
        return out


@register("canonical_lora")
class CanonicalLoRAMethod(Method[CanonicalLoRA]):
    """The method as such; see the module."""

    bridge_class = "megatron.bridge.peft.canonical_lora.CanonicalLoRA"

    def build(self, target: Target) -> Adapter:
        if not target.parts:
            return LoRAAdapter(*self._pair(target, ""))
        return PartsAdapter(self, {part: Pair(*self._pair(target, part)) for part in target.parts})

    def _pair(self, target: Target, part: str) -> tuple[Tensor, Tensor, float, float, str]:
        section = self.section
        dtype = getattr(torch, section.lora_dtype or "float32")
        out_features, in_features = shape(self.model, part or target.name)
        a = matrix(section.lora_A_init_method, section.dim, in_features, target.generator(part))
        b = torch.zeros(out_features, section.dim)
        return a.to(dtype), b.to(dtype), section.scale, section.dropout, section.dropout_position

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        found = {}
        for key in tensors:
            before, _, last = key.rpartition("linear_in.weight")
            if last == "" and key.endswith("linear_in.weight"):
                a, b = tensors[key].float(), tensors[f"{before}linear_out.weight"].float()
                found[_PARTS.get(before.rstrip("."), "")] = Factors(a, b, self.section.scale)
        return found
