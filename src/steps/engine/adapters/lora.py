"""LoRA: W x + (alpha / dim) B A x (arXiv 2106.09685, section 4.1), as Megatron-Bridge's ParallelLinearAdapter has it.

A fused linear (linear_qkv, linear_fc1) gets one A and one B over all its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.config.peft import LoRA
from steps.engine.adapters.base import Adapter, Method, register
from steps.engine.model.layers import Linear


class Factor(nn.Module):
    """One trained matrix, `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoRAAdapter(Adapter):
    """linear_in.weight A [r, in], linear_out.weight B [out, r]."""

    def __init__(self, linear_in: Tensor, linear_out: Tensor, scale: float, dropout: float, position: str) -> None:
        super().__init__()
        self.linear_in, self.linear_out = Factor(linear_in), Factor(linear_out)
        self.scale, self.dropout, self.position = scale, dropout, position

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        base = linear.project(x)
        # Masters may be float32 beside a bfloat16 base: the products run in the base's dtype.
        a, b = self.linear_in.weight.to(x.dtype), self.linear_out.weight.to(x.dtype)
        if self.position == "post" and self.dropout and self.training:
            return base + F.dropout(low_rank(None, x, a, b, self.scale), self.dropout)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return low_rank(base, x, a, b, self.scale)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = F.linear(x, a)
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        ctx.mark_dirty(base)
        return base.addmm_(inner, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, None]:
        x, inner, a, b = ctx.saved_tensors
        (grad,) = grads
        d_inner = (grad @ b).mul_(ctx.scale)
        # (inner^T grad)^T runs twice as fast as grad^T inner: the thin matrix is on the left.
        d_b = (inner.T @ grad).T.mul_(ctx.scale)
        d_x = d_inner @ a if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, d_x, d_inner.T @ x, d_b, None


def low_rank(base: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """base + scale * (x A^T) B^T, added in place; base None: zeros. x: [tokens, in], a: [r, in], b: [out, r]."""
    if base is None:
        base = x.new_zeros(len(x), len(b))
    out: Tensor = _LowRank.apply(base, x, a, b, scale)  # type: ignore[no-untyped-call]
    return out


@register("lora")
class LoRAMethod(Method[LoRA]):
    """The method as such; see the module."""

    bridge_class = "megatron.bridge.peft.lora.LoRA"

    @property
    def scale(self) -> float:
        """alpha / dim."""
        return self.section.alpha / self.section.dim

    def build(self, name: str, linear: Linear, generator: torch.Generator) -> LoRAAdapter:
        section = self.section
        dtype = getattr(torch, section.lora_dtype or "float32")
        linear_in = start(section.lora_A_init_method, section.dim, linear.in_features, generator).to(dtype)
        linear_out = torch.zeros(linear.out_features, section.dim, dtype=dtype)
        return LoRAAdapter(linear_in, linear_out, self.scale, section.dropout, section.dropout_position)

    def merge(self, name: str, weight: Tensor, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        a, b = tensors["linear_in.weight"].float(), tensors["linear_out.weight"].float()
        return torch.addmm(weight, b, a, alpha=self.scale)


def start(how: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A [rows, columns] float32 matrix drawn as `lora_A_init_method` says."""
    weight = torch.empty(rows, columns)
    if how == "xavier":
        return nn.init.xavier_normal_(weight, generator=generator)
    if how == "uniform":
        return nn.init.xavier_uniform_(weight, generator=generator)
    assert how == "kaiming", how
    return nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
