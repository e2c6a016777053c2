"""RMSNorm and SwiGLU with hand-written backward passes: they keep their input and nothing else.

Left to autograd each would keep three or four float32 copies of its input per layer, which is most of the activation
memory of a frozen model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where the input is that."""
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(_wide(x))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        # Rounded before the weight is applied, as transformers does it.
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        inner = (grads[0] * weight).to(scale.dtype)
        inner -= normed * (inner * normed).mean(-1, keepdim=True)
        return (inner * scale).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), computed in float32.

    x: [..., n]; weight: [n], frozen: it gets no gradient. Returns x's shape and dtype.
    """
    out: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        d_gate, d_up = result.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        torch.mul(grad, activated, out=d_up)
        # d silu(g) / dg = s + g s (1 - s) = s + silu(g) - silu(g) s
        torch.mul(grad * up, sigmoid + activated - activated * sigmoid, out=d_gate)
        return result


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202). x: [..., 2 * F], gate first; returns [..., F]."""
    out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return out
