"""RMSNorm and SwiGLU with hand-written backward passes: they keep their input and next to nothing else.

Left to autograd each would keep three or four float32 copies of its input per layer, which is most of the activation
memory of a frozen model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from steps.engine.model.fusion import fused


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where the input is that."""
    return torch.promote_types(x.dtype, torch.float32)


@fused
def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The normed x, and 1 / rms of each row."""
    wide = x.to(_wide(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    # Rounded before the weight is applied, as transformers does it.
    return (wide * scale).to(x.dtype) * weight, scale


@fused
def _norm_backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    normed = x.to(scale.dtype) * scale
    inner = (grad * weight).to(scale.dtype)
    inner = inner - normed * (inner * normed).mean(-1, keepdim=True)
    return (inner * scale).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = _norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (x.to(scale.dtype) * scale * grads[0]).flatten(0, -2).sum(0).to(weight.dtype)
        return _norm_backward(x, weight, scale, grads[0]), d_weight, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), computed in float32.

    x: [..., n]; weight: [n]. Returns x's shape and dtype.
    """
    out: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


@fused
def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@fused
def _swiglu_backward(x: Tensor, grad: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((d_gate, F.silu(gate).mul_(grad)), dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _swiglu_backward(x, grads[0])


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202). x: [..., 2 * F], gate first; returns [..., F]."""
    out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return out
