"""Weights held in few bits and made wide where they are used (QLoRA, arXiv 2305.14314, section 3).

A weight is cut, in row-major order, into blocks of `block_size` values; the last may be shorter. Each block has one
float32 scale, its largest magnitude, and each value is the index of the nearest entry of a code in [-1, 1] to value /
scale. Double quantization writes the scales themselves in 8 bits, in blocks of 256 of them, around their mean.

Codes, packed bytes and values have the bits that bitsandbytes 0.50 gives them on a CPU, wherever they lie and whether
or not it is installed; where it is, its kernels do the same faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from steps.engine.model import quantization_kernels as kernels
from steps.engine.model.quantization_codes import CODES, decoded, dynamic_map, dynamic_points, nearest

#: Scales that share one scale of their own.
SCALES_BLOCK = 256
# Values quantized at once, a multiple of every block size: few enough for the cache, and for the memory beside a model.
_PIECE = 64 * 4096


class Spec(Protocol):
    """How a weight is held; the section `peft.quantization` is one. type: a name in CODES."""

    @property
    def type(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def double_quant(self) -> bool: ...


class QuantizedWeight(nn.Module):
    """A weight [out, in] in few bits.

    packed:        uint8, 8 / bits values a byte, the first in the highest bits.
    scales:        one a block: float32; uint8 with double quantization, indices of the dynamic map.
    scales_absmax: float32, one for 256 scales.   scales_offset: float32 [1], their mean.   Empty without it.
    """

    packed: Tensor
    scales: Tensor
    scales_absmax: Tensor
    scales_offset: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        spec: Spec,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Without values yet: `copy_` fills it.

        dtype:         of the weight that it stands for, and of what `dense` gives.
        compute_dtype: of products with it; None: dtype.
        """
        super().__init__()
        self.shape, self.dtype, self.compute_dtype = torch.Size(shape), dtype, compute_dtype or dtype
        self.code_name, self.block_size, self.double_quant = spec.type, spec.block_size, spec.double_quant
        self.code = CODES[spec.type]
        blocks = math.ceil(self.shape.numel() / self.block_size)
        twice = self.double_quant
        self.register_buffer(
            "packed", torch.empty(math.ceil(self.shape.numel() * self.code.bits / 8), dtype=torch.uint8)
        )
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8 if twice else torch.float32))
        self.register_buffer("scales_absmax", torch.empty(math.ceil(blocks / SCALES_BLOCK) if twice else 0))
        self.register_buffer("scales_offset", torch.empty(1 if twice else 0))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> QuantizedWeight:
        """Quantize weight [out, in], any float dtype, into here; computed where it lies, piece by piece.

        Raises ValueError if a value is not finite.
        """
        assert weight.shape == self.shape
        packed, scales = [], []
        for piece in torch.split(weight.detach().reshape(-1), _PIECE):
            index, scale = _quantized(piece.float(), self.code_name, self.block_size)
            packed.append(_packed(index, self.code.bits))
            scales.append(scale)
        absmax = torch.cat(scales)
        self.packed.copy_(torch.cat(packed))
        if self.double_quant:
            offset = absmax.mean()
            index, outer = _quantized_scales(absmax - offset)
            self.scales.copy_(index)
            self.scales_absmax.copy_(outer)
            self.scales_offset.copy_(offset)
        else:
            self.scales.copy_(absmax)
        return self

    @torch.no_grad()
    def absmax(self) -> Tensor:
        """The scale of each block, float32 [blocks]."""
        if not self.double_quant:
            return self.scales
        blocks = len(self.scales)
        inner = torch.index_select(dynamic_map(self.scales.device), 0, self.scales.int())
        inner *= self.scales_absmax.repeat_interleave(SCALES_BLOCK)[:blocks]
        return inner.add_(self.scales_offset)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], made anew: code times scale in float32, rounded to dtype (default: compute_dtype)."""
        dtype, absmax = dtype or self.compute_dtype, self.absmax()
        found = kernels.dequantize(self, absmax, dtype)
        return self.dequantize_here(absmax).to(dtype) if found is None else found

    def dequantize_here(self, absmax: Tensor) -> Tensor:
        """The same in torch alone, float32. absmax: what `absmax()` says."""
        numel = self.shape.numel()
        values = decoded(self.packed, self.code_name)[:numel]
        full = numel // self.block_size * self.block_size
        blocks = values[:full].view(-1, self.block_size)
        blocks *= absmax[: len(blocks), None]
        if full < numel:
            values[full:] *= absmax[-1]
        return values.view(self.shape)


def quantize(weight: Tensor, spec: Spec, compute_dtype: torch.dtype | None = None) -> QuantizedWeight:
    """weight [out, in], any float dtype, held as `spec` says, on weight's device (of a meta tensor: without values)."""
    rows, columns = weight.shape
    with weight.device:
        held = QuantizedWeight((rows, columns), spec, weight.dtype, compute_dtype)
    return held if weight.is_meta else held.copy_(weight)


def as_held(held: Callable[[str], Spec | None], name: str, weight: Tensor) -> Tensor:
    """The weight [out, in] of the linear called `name`, float32, as a decoder with `quantize=held` computes with it."""
    spec = held(name)
    return weight.float() if spec is None else quantize(weight, spec).dequantize(torch.float32)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        dtype = weight.compute_dtype
        return F.linear(x.to(dtype), weight.dequantize(), None if bias is None else bias.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad.to(ctx.weight.compute_dtype) @ ctx.weight.dequantize()).to(grad.dtype), None, None


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b, computed in weight.compute_dtype. W is made wide here, and again for the gradient of x; never kept.

    x: [tokens, in]; bias: [out], frozen. Returns [tokens, out] in x's dtype.
    """
    out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _quantized(values: Tensor, code_name: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Index of each value (uint8, padded with that of 0 to a whole byte) and scale of each block (float32)."""
    full = len(values) // block_size * block_size
    scales, scaled = [], []
    for blocks, exact in ((values[:full].view(-1, block_size), False), (values[full:].view(1, -1), True)):
        if blocks.numel():
            absmax = blocks.abs().amax(1)
            floor = absmax.clamp(min=1e-38)
            scales.append(floor if exact else absmax)
            # bitsandbytes divides the short block at the end and multiplies the others with the reciprocal.
            normed = blocks / floor[:, None] if exact else blocks * (1 / floor)[:, None]
            scaled.append(normed.clamp_(-1, 1).view(-1))
    if not all(scale.isfinite().all() for scale in scales):
        raise ValueError("holds values that are infinite or NaN, which cannot be quantized")
    if short := -len(values) % (8 // CODES[code_name].bits):
        scaled.append(values.new_zeros(short))
    return nearest(torch.cat(scaled), code_name), torch.cat(scales)


def _packed(index: Tensor, bits: int) -> Tensor:
    """Indices [n] of `bits` bits each as bytes, the first in the highest bits."""
    parts = index.view(-1, 8 // bits).unbind(1)
    packed = parts[0]
    for part in parts[1:]:
        packed = packed << bits | part
    return packed


def _quantized_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit index of each value (uint8) and scale of each 256 of them (float32)."""
    padded = F.pad(values, (0, -len(values) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    absmax = padded.abs().amax(1)
    # 0 / 0 in a block of zeros: any code does, bitsandbytes takes the first.
    scaled = (padded * (1 / absmax)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    # bitsandbytes does not search the map but looks up the entry nearest to the nearest of 2^16 points in [-1, 1].
    point = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    index = torch.index_select(dynamic_points().to(values.device), 0, point.view(-1))
    return index[: len(values)], absmax
