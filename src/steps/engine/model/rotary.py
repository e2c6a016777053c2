"""Rotary position embeddings (arXiv 2104.09864), with Llama-3's frequency scaling, computed as transformers does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steps.engine.model.fusion import fused
from steps.shapes.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each channel pair, [D / 2] float32. Raises ValueError for a scaling it does not know."""
    channels = torch.arange(0, config.kv_channels, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (config.rotary_base ** (channels / config.kv_channels))
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type", "llama3"))
    if kind == "default":
        return frequencies
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported (supported: llama3, default)")
    return _scale_llama3(frequencies, scaling)


def _scale_llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(between, blended, stretched)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions` [tokens], each [tokens, 1, 1, D / 2] in `dtype`.

    The angles are float32: at position 8,000 a bfloat16 angle is wrong by whole turns.
    """
    angles = positions.float()[:, None, None, None] * frequencies.to(positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@fused
def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None  # the other way round


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i with channel i + D/2. x: [tokens, groups, heads, D]; same shape and dtype out."""
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out
