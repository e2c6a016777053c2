"""Hugging Face's tensor names and layouts, and Megatron's: one table, read both ways.

Each row names one Megatron parameter and the Hugging Face tensors it is made of, with their shapes. `{}` is the layer.
Where a Megatron parameter is made of several, they are parts of its array, in place: left to right they are read into
it, right to left they are taken out of it. Both are the same numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from steps.engine.checkpoint.lazy import Array, LazyTensor, LazyTensors, derived, empty
from steps.errors import ArtifactError, Problem
from steps.shapes.model_config import ModelConfig
from steps.shapes.targets import PARTS

if TYPE_CHECKING:
    from torch import Tensor

_PADDED = frozenset(("embedding.word_embeddings.weight", "output_layer.weight"))


def _qkv(config: ModelConfig, whole: Array) -> list[Array]:
    """Per group of query heads: its queries, its key, its value. whole: [(heads + 2 * groups) * D, …].

    Returns q [groups, heads / groups * D, …], k and v [groups, D, …]: views.
    """
    queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
    grouped = whole.reshape(config.num_query_groups, -1, *whole.shape[1:])
    return np.split(grouped, [queries, queries + config.kv_channels], axis=1)


def part_view(config: ModelConfig, part: str, tensor: Tensor) -> Tensor:
    """The outputs of one part of a fused linear, as a view of the whole: what is written there lands in `tensor`.

    part:   "linear_q", …, as in shapes/targets.py; '' (or a linear that is not fused) for all of it.
    tensor: [..., out of the fused linear]. Returns [..., groups, heads, D] for a part of linear_qkv, else [..., out].
    """
    if part in PARTS["linear_qkv"]:
        heads = tensor.shape[-1] // (config.num_query_groups * config.kv_channels)  # -1 would fail for an empty tensor
        grouped = tensor.view(*tensor.shape[:-1], config.num_query_groups, heads, config.kv_channels)
        at = {"linear_q": slice(0, -2), "linear_k": slice(-2, -1), "linear_v": slice(-1, None)}[part]
        return grouped[..., at, :]
    if part in PARTS["linear_fc1"]:
        return tensor.chunk(2, dim=-1)[PARTS["linear_fc1"].index(part)]
    return tensor


def _halves(config: ModelConfig, whole: Array) -> list[Array]:
    return np.split(whole, 2)


@dataclass(frozen=True)
class Row:
    """One row: a Megatron parameter, its Hugging Face tensors with their shapes (in the letters of `_sizes`).

    only_if: the ModelConfig flag of a model that has it.
    parts:   the places of those tensors in the parameter's array, as views; each holds its tensor's elements in order.
    """

    megatron: str
    hf: Mapping[str, str]
    only_if: str = ""
    parts: Callable[[ModelConfig, Array], list[Array]] = _halves


_ATTENTION, _MLP = "decoder.layers.{}.self_attention.", "decoder.layers.{}.mlp."
_HF, _HF_ATTENTION = "model.layers.{}.", "model.layers.{}.self_attn."

TABLE = (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "V H"}),
    Row(_ATTENTION + "linear_qkv.layer_norm_weight", {_HF + "input_layernorm.weight": "H"}),
    Row(
        _ATTENTION + "linear_qkv.weight",
        {_HF_ATTENTION + f"{part}_proj.weight": f"{size} H" for part, size in zip("qkv", "QKK", strict=True)},
        parts=_qkv,
    ),
    Row(
        _ATTENTION + "linear_qkv.bias",
        {_HF_ATTENTION + f"{part}_proj.bias": size for part, size in zip("qkv", "QKK", strict=True)},
        only_if="add_qkv_bias",
        parts=_qkv,
    ),
    Row(_ATTENTION + "q_layernorm.weight", {_HF_ATTENTION + "q_norm.weight": "D"}, only_if="qk_layernorm"),
    Row(_ATTENTION + "k_layernorm.weight", {_HF_ATTENTION + "k_norm.weight": "D"}, only_if="qk_layernorm"),
    Row(_ATTENTION + "linear_proj.weight", {_HF_ATTENTION + "o_proj.weight": "H Q"}),
    Row(_MLP + "linear_fc1.layer_norm_weight", {_HF + "post_attention_layernorm.weight": "H"}),
    Row(
        _MLP + "linear_fc1.weight",
        {_HF + "mlp.gate_proj.weight": "F H", _HF + "mlp.up_proj.weight": "F H"},
    ),
    Row(_MLP + "linear_fc2.weight", {_HF + "mlp.down_proj.weight": "H F"}),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "H"}),
    Row("output_layer.weight", {"lm_head.weight": "V H"}, only_if="untied"),
)


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "Q": config.query_size,
        "K": config.num_query_groups * config.kv_channels,
        "D": config.kv_channels,
        "F": config.ffn_hidden_size,
    }


def _rows(config: ModelConfig) -> Iterator[tuple[Row, str, dict[str, tuple[int, ...]]]]:
    """The rows that this model has, in the order of computation: (row, Megatron name, shape by Hugging Face name)."""
    flags = {"": True, "untied": not config.share_embeddings_and_output_weights}
    sizes = _sizes(config)
    rows = [row for row in TABLE if flags.get(row.only_if) or getattr(config, row.only_if, False)]
    per_layer = [row for row in rows if "{}" in row.megatron]
    first, last = rows.index(per_layer[0]), rows.index(per_layer[-1]) + 1
    ordered = [(row, 0) for row in rows[:first]]
    ordered += [(row, layer) for layer in range(config.num_layers) for row in per_layer]
    ordered += [(row, 0) for row in rows[last:]]
    for row, layer in ordered:
        shapes = {
            name.format(layer): tuple(sizes[letter] for letter in shape.split()) for name, shape in row.hf.items()
        }
        yield row, row.megatron.format(layer), shapes


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of a model, in the order of computation."""
    return {name: shape for _, _, shapes in _rows(config) for name, shape in shapes.items()}


def to_megatron(config: ModelConfig, hf: LazyTensors, where: str = "the model") -> dict[str, LazyTensor]:
    """Megatron's parameters (per-layer names), in the order of computation, from Hugging Face's tensors.

    where: what is read, for the messages. Raises ArtifactError listing tensors that are missing, unknown or of a wrong
    shape.
    """
    _check(hf_shapes(config), hf, where)
    return {name: _joined(row, config, [hf[part] for part in shapes]) for row, name, shapes in _rows(config)}


def to_hf(config: ModelConfig, megatron: LazyTensors, where: str = "the checkpoint") -> dict[str, LazyTensor]:
    """Hugging Face's tensors from Megatron's parameters; the inverse of `to_megatron`.

    Rows of embedding and output layer beyond `vocab_size`, Megatron's padding, are left out.
    """
    megatron = unpadded(config, megatron)
    expected = {}
    for row, name, shapes in _rows(config):
        first = next(iter(shapes.values()))
        rows = sum(shape[0] for shape in shapes.values())
        expected[name] = first if len(row.hf) == 1 else (rows, *first[1:])
    _check(expected, megatron, where)
    result = {}
    for row, name, shapes in _rows(config):
        if len(shapes) == 1:
            result[next(iter(shapes))] = megatron[name]
            continue
        parts = _Parts(row, config, megatron[name])
        for index, (part, shape) in enumerate(shapes.items()):
            result[part] = derived(shape, megatron[name].dtype, lambda parts=parts, index=index: parts.take(index))  # type: ignore[misc]
    return result


def unpadded(config: ModelConfig, megatron: LazyTensors) -> dict[str, LazyTensor]:
    """The same parameters, with embedding and output layer cut to `vocab_size` rows.

    Megatron pads the vocabulary to a multiple of make_vocab_size_divisible_by times the tensor parallel size.
    """
    return {name: _cut(tensor, config.vocab_size) if name in _PADDED else tensor for name, tensor in megatron.items()}


def _cut(tensor: LazyTensor, rows: int) -> LazyTensor:
    if tensor.shape[0] <= rows:
        return tensor
    return derived((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.array()[:rows])


def _joined(row: Row, config: ModelConfig, parts: list[LazyTensor]) -> LazyTensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if len({part.dtype for part in parts}) > 1:
        names = ", ".join(row.hf)
        raise ArtifactError(f"{names} differ in dtype and cannot be fused", hint="Convert with dtype: float32.")

    def make() -> Array:
        whole = empty(shape, parts[0].dtype)
        for part, place in zip(parts, row.parts(config, whole), strict=True):
            part.source(place)
        return whole

    return derived(shape, parts[0].dtype, make)


class _Parts:
    """The parts of a fused tensor, each taken once: the fused one is read when the first is asked for, then let go."""

    def __init__(self, row: Row, config: ModelConfig, whole: LazyTensor) -> None:
        self._row, self._config, self._whole = row, config, whole
        self._waiting: dict[int, Array] = {}

    def take(self, index: int) -> Array:
        if index not in self._waiting:
            self._waiting = dict(enumerate(self._row.parts(self._config, self._whole.array())))
        return self._waiting.pop(index)


def _check(expected: Mapping[str, tuple[int, ...]], found: LazyTensors, where: str) -> None:
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"{_few(missing)} missing")
    if extra := [name for name in found if name not in expected]:
        faults.append(f"{_few(extra)} not part of a supported model")
    wrong = [name for name, shape in expected.items() if name in found and found[name].shape != shape]
    if wrong:
        shapes = f"has the shape {list(found[wrong[0]].shape)}, the configuration says {list(expected[wrong[0]])}"
        more = f" ({len(wrong) - 1} other tensors disagree too)" if len(wrong) > 1 else ""
        faults.append(f"{wrong[0]} {shapes}{more}")
    if faults:
        raise ArtifactError([Problem(where=where, what=fault, name="unsupported_model") for fault in faults])


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'are' if len(names) > 1 else 'is'}"
