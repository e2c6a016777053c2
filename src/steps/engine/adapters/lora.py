"""LoRA: W x + s B A x (arXiv 2106.09685, section 4.1), as Megatron-Bridge's ParallelLinearAdapter has it.

A fused linear (linear_qkv, linear_fc1) gets one A and one B over all its outputs. s is alpha / dim, or alpha /
sqrt(dim) (rsLoRA, arXiv 2312.03732); linear_out may learn faster than linear_in (LoRA+, arXiv 2402.12354).

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start A and B from the weight itself and take what they then do
away from the base. Here the base stays as it is, to the bit, and the start A0, B0 is subtracted on the way:
W x + s (B A - B0 A0) x, which is the same function and, as [B, -B0] [A; A0], a plain LoRA of rank 2 dim for everybody
who reads the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.config.peft.lora import LoRA
from steps.engine.adapters.base import Adapter, Adapters, Factors, Group, Method, Target, register
from steps.engine.adapters.starts import activations, matrix, principal, qr
from steps.engine.data.batches import MicroBatch
from steps.engine.model.layers import Linear
from steps.errors import ConfigError, Problem

#: Takes [..., out] to the view of it that one part of a fused linear writes to.
Slot = Callable[[Tensor], Tensor]


class Factor(nn.Module):
    """One trained matrix, `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Pair(nn.Module):
    """linear_in.weight A [r, in] and linear_out.weight B [out, r], with the dropout that belongs to them."""

    def __init__(self, linear_in: Tensor, linear_out: Tensor, scale: float, dropout: float, position: str) -> None:
        super().__init__()
        self.linear_in, self.linear_out = Factor(linear_in), Factor(linear_out)
        self.scale, self.dropout, self.position = scale, dropout, position

    def forward(self, base: Tensor, x: Tensor, slot: Slot | None = None) -> Tensor:
        """base [tokens, out] (changed in place) plus the update of x [tokens, in]; slot: into that part of base."""
        a, b = self.matrices(x.dtype)
        if not self.dropout or not self.training:
            return low_rank(base, x, a, b, self.scale, slot)
        if self.position == "pre":
            return low_rank(base, F.dropout(x, self.dropout), a, b, self.scale, slot)
        dropped = F.dropout(low_rank(x.new_zeros(len(x), len(b)), x, a, b, self.scale), self.dropout)
        if slot is None:
            return base + dropped
        whole = torch.zeros_like(base)
        view = slot(whole)
        view += dropped.view(view.shape)
        return base + whole

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the products; masters may be float32 beside a bfloat16 base."""
        return self.linear_in.weight.to(dtype), self.linear_out.weight.to(dtype)


class LoRAAdapter(Pair, Adapter):  # type: ignore[misc]  # forward takes the linear instead of its output
    """A and B on the whole linear."""

    def forward(self, x: Tensor, linear: Linear) -> Tensor:  # type: ignore[override]
        return Pair.forward(self, linear.project(x), x)


class MovedStart(LoRAAdapter):
    """The same minus its own start: buffers start_in [r, in] and start_out [out, r]."""

    start_in: Tensor
    start_out: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("start_in", self.linear_in.weight.detach().clone())
        self.register_buffer("start_out", self.linear_out.weight.detach().clone())

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a = torch.cat((self.linear_in.weight, self.start_in)).to(dtype)
        b = torch.cat((self.linear_out.weight, -self.start_out), dim=1).to(dtype)
        return a, b


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, slot: Slot | None) -> Tensor:
        inner = F.linear(x, a)
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale, ctx.slot = scale, slot
        ctx.mark_dirty(base)
        if slot is None:
            return base.addmm_(inner, b.T, alpha=scale)
        view = slot(base)
        view.add_(F.linear(inner, b).view(view.shape), alpha=scale)
        return base

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, None, None]:
        x, inner, a, b = ctx.saved_tensors
        (grad,) = grads
        part = grad if ctx.slot is None else ctx.slot(grad).reshape(len(x), -1)
        d_inner = (part @ b).mul_(ctx.scale)
        # (inner^T grad)^T runs twice as fast as grad^T inner: the thin matrix is on the left.
        d_b = (inner.T @ part).T.mul_(ctx.scale)
        d_x = d_inner @ a if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, d_x, d_inner.T @ x, d_b, None, None


def low_rank(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, slot: Slot | None = None) -> Tensor:
    """base + scale * (x A^T) B^T, added in place. base: [tokens, out], x: [tokens, in], a: [r, in], b: [out, r].

    slot: b has the rows of one part only, and slot(base) is where that part's outputs are.
    """
    out: Tensor = _LowRank.apply(base, x, a, b, scale, slot)  # type: ignore[no-untyped-call]
    return out


@register("lora")
class LoRAMethod(Method[LoRA]):
    """The method as such; see the module."""

    bridge_class = "megatron.bridge.peft.lora.LoRA"

    def build(self, target: Target) -> LoRAAdapter:
        section, linear = self.section, target.linear
        dtype = getattr(torch, section.lora_dtype or "float32")
        if section.moves_the_start:
            start = principal if section.init_lora_weights == "pissa" else qr
            a, b = start(linear.dense().float(), section.dim, section.scale, target.generator())
        else:
            a = matrix(section.lora_A_init_method, section.dim, linear.in_features, target.generator())
            b = torch.zeros(linear.out_features, section.dim)
        kind = MovedStart if section.moves_the_start else LoRAAdapter
        return kind(a.to(dtype), b.to(dtype), section.scale, section.dropout, section.dropout_position)

    @property
    def calibration_rows(self) -> int:
        return self.section.calibration_rows if self.section.init_lora_weights == "eva" else 0

    def start(self, adapters: Adapters, batches: Sequence[MicroBatch]) -> None:
        """EVA (arXiv 2410.07170): linear_in spans the directions in which the linear's inputs vary most. The ranks are
        not redistributed (rho = 1): Megatron stores one shape for all layers."""
        if self.section.init_lora_weights != "eva":
            return
        tokens = sum(len(batch.input_ids) for batch in batches)
        if tokens < self.section.dim:
            what = f"{len(batches)} rows hold {tokens} tokens, too few to find {self.section.dim} directions"
            raise ConfigError(Problem(where="peft.calibration_rows", what=what, hint="Raise it, or lower peft.dim."))
        for name, directions in activations(adapters, batches, self.section.dim).items():
            module = adapters.modules[name]
            assert isinstance(module, LoRAAdapter)
            with torch.no_grad():
                module.linear_in.weight.copy_(directions)

    def group(self, name: str, parameter: nn.Parameter) -> Group:
        usual = super().group(name, parameter)
        return Group(self.section.lora_plus_ratio if name.endswith("linear_out.weight") else 1.0, usual.wd_mult)

    def factors(self, name: str, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Mapping[str, Factors]:
        a, b = tensors["linear_in.weight"].float(), tensors["linear_out.weight"].float()
        if "start_in" in tensors:
            a = torch.cat((a, tensors["start_in"].float()))
            b = torch.cat((b, -tensors["start_out"].float()), dim=1)
        return {"": Factors(a, b, self.section.scale)}
