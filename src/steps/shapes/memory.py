"""Bytes that a training run holds from its first step to its last, by arithmetic on the shapes. Free of torch.

Activations come on top (activations.py, estimate.py): they depend on the rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from steps.config.peft import Peft, Quantization
from steps.shapes import targets
from steps.shapes.model_config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
_BITS = {"nf2": 2, "nf4": 4, "int8": 8}
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


def held(section: Peft | None, model: ModelConfig, precision: str) -> Iterator[Held]:
    """What one process of our engine holds: the frozen base, the adapter, its gradients, the optimizer's state.

    section: None where the model itself is trained.   precision: `train.precision`.
    """
    dtype = computed(model, precision)
    width = BYTES[dtype]
    if section is None:
        yield Held("weights", dtype, model.parameters * width)
        # train.trained.WholeModel: what the optimizer updates, and where gradients add up.
        if dtype != "float32":
            yield Held("weights as they are updated", "float32", model.parameters * BYTES["float32"])
        yield Held("gradients", "float32", model.parameters * BYTES["float32"])
        yield Held("moments of Adam", f"{_MOMENTS} x float32", _MOMENTS * model.parameters * BYTES["float32"])
        return
    yield from _linears(section, model, dtype)
    tables = (1 if model.share_embeddings_and_output_weights else 2) * model.vocab_size * model.hidden_size
    yield Held("embedding, output layer", dtype, tables * width)
    yield Held("norms, biases", dtype, (model.norm_parameters + model.bias_parameters) * width)
    names = targets.chosen(section, model.num_layers)
    shapes = [targets.shape(model, name) for name in names]
    trained = section.shared_trainable() + sum(
        section.trainable_at(targets.layer(name), *shape) for name, shape in zip(names, shapes, strict=True)
    )
    own = section.adapter_dtype
    wide = sum(section.wide_trainable(*shape) for shape in shapes)
    parameters = (trained - wide) * BYTES[own] + wide * BYTES["float32"]
    yield Held("adapter", own, parameters)
    if beside := sum(section.untrained_bytes(*shape) for shape in shapes):
        yield Held("untrained tensors of the adapter", "", beside)
    yield Held("gradients", own, parameters)
    yield Held("moments of Adam", f"{_MOMENTS} x {own}", _MOMENTS * parameters)


def computed(model: ModelConfig, precision: str) -> str:
    """The dtype of `train.precision`; auto is taken as it is on hardware that is fast at bfloat16."""
    if precision != "auto":
        return precision
    return "bfloat16" if model.params_dtype == "bfloat16" else "float32"


def notes(section: Peft | None, model: ModelConfig, precision: str) -> Iterator[str]:
    """What the bytes leave open."""
    if section is not None and section.open:
        yield f"peft.type={section.type} searches first, which takes memory of its own: the base as it is stored"
    if precision == "auto" and model.params_dtype == "bfloat16":
        yield "train.precision=auto: float32, twice as wide, where the hardware is slow at bfloat16"


def _linears(section: Peft, model: ModelConfig, dtype: str) -> Iterator[Held]:
    """Weights of all linears, by how they are held. A quantized one is so by itself, its values in order in blocks."""
    weights: Counter[str] = Counter()
    scales: Counter[str] = Counter()
    for name in targets.linear_names(model.num_layers):
        size, settings = math.prod(targets.shape(model, name)), section.held(name)
        if settings is None:
            weights[dtype] += size * BYTES[dtype]
        else:
            weights[settings.type] += math.ceil(size * _BITS[settings.type] / 8)
            scales["8 bits" if settings.double_quant else "float32"] += scale_bytes(size, settings)
    yield from (Held("weights of linears", kind, nbytes) for kind, nbytes in weights.items())
    yield from (Held("scales of linears", kind, nbytes) for kind, nbytes in scales.items())


def scale_bytes(size: int, settings: Quantization) -> int:
    """Bytes of the scales of a quantized matrix of `size` values.

    One float32 for each block; in double quantization one byte for each, a float32 for each block of those, and their
    mean, which is taken off first.
    """
    blocks = math.ceil(size / settings.block_size)
    return blocks + 4 * math.ceil(blocks / _SCALES_PER_BLOCK) + 4 if settings.double_quant else 4 * blocks
