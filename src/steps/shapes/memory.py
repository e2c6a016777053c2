"""Bytes that a training run holds from its first step to its last, by arithmetic on the shapes. Free of torch.

Activations come on top: they depend on the rows, and on what the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from steps.config.peft import Peft, Quantization
from steps.shapes import targets
from steps.shapes.model_config import ModelConfig

_BYTES = {"float32": 4, "bfloat16": 2}
#: Adam's exp_avg and exp_avg_sq. Its step counters, 4 bytes for each trained tensor, are left out.
_MOMENTS = 2
#: Scales that share a scale of their own in double quantization (QLoRA, arXiv 2305.14314, section 3).
_SCALES_PER_BLOCK = 256


@dataclass(frozen=True)
class Held:
    """What is held, as what ("bfloat16", "nf4"), and how much of it."""

    what: str
    dtype: str
    nbytes: int


def held(section: Peft, model: ModelConfig, precision: str) -> Iterator[Held]:
    """What one process of our engine holds: the frozen base, the adapter, its gradients, the optimizer's state.

    precision: `train.precision`.
    """
    dtype = computed(model, precision)
    width = _BYTES[dtype]
    sizes = [out * into for out, into in (targets.shape(model, name) for name in targets.LINEARS)]
    if section.quantization is None:
        yield Held("weights of linears", dtype, model.num_layers * sum(sizes) * width)
    else:
        yield from _quantized(section.quantization, sizes, model.num_layers)
    tables = (1 if model.share_embeddings_and_output_weights else 2) * model.vocab_size * model.hidden_size
    yield Held("embedding, output layer", dtype, tables * width)
    yield Held("norms, biases", dtype, (model.norm_parameters + model.bias_parameters) * width)
    shapes = [targets.shape(model, name) for name in targets.chosen(section, model.num_layers)]
    trained = section.shared_trainable() + sum(section.trainable(*shape) for shape in shapes)
    own = section.adapter_dtype
    yield Held("adapter", own, trained * _BYTES[own])
    if beside := sum(section.untrained_bytes(*shape) for shape in shapes):
        yield Held("untrained tensors of the adapter", "", beside)
    yield Held("gradients", own, trained * _BYTES[own])
    yield Held("moments of Adam", f"{_MOMENTS} x {own}", _MOMENTS * trained * _BYTES[own])


def computed(model: ModelConfig, precision: str) -> str:
    """The dtype of `train.precision`; auto is taken as it is on hardware that is fast at bfloat16."""
    if precision != "auto":
        return precision
    return "bfloat16" if model.params_dtype == "bfloat16" else "float32"


def notes(model: ModelConfig, precision: str) -> Iterator[str]:
    """What the bytes leave open."""
    yield "activations come on top"
    if precision == "auto" and model.params_dtype == "bfloat16":
        yield "train.precision=auto: float32, twice as wide, where the hardware is slow at bfloat16"


def _quantized(settings: Quantization, sizes: list[int], layers: int) -> Iterator[Held]:
    """sizes: values of each linear of one layer. Every one is quantized by itself, in blocks of its values in order."""
    packed = sum(-(-size // 2) if settings.type == "nf4" else size for size in sizes)
    yield Held("weights of linears", settings.type, layers * packed)
    scales = layers * sum(scale_bytes(size, settings) for size in sizes)
    yield Held("scales of linears", "8 bits" if settings.double_quant else "float32", scales)


def scale_bytes(size: int, settings: Quantization) -> int:
    """Bytes of the scales of a quantized matrix of `size` values.

    One float32 for each block; in double quantization one byte for each, a float32 for each block of those, and their
    mean, which is taken off first.
    """
    blocks = -(-size // settings.block_size)
    return blocks + 4 * -(-blocks // _SCALES_PER_BLOCK) + 4 if settings.double_quant else 4 * blocks
