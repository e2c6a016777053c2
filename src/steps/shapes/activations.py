"""Bytes that one forward pass keeps for its backward pass, tensor by tensor, by arithmetic. Free of torch.

This page says what the autograd functions of the engine save. Whoever changes one of them changes its line here;
tests/unit/shapes/test_activations.py holds both against each other, by counting what autograd really holds.

A frozen linear saves nothing of the tokens. Nothing is saved either before the first adapter, where no gradient goes.
Attention is the one of a CPU; PyTorch's on a GPU keeps keys and values repeated for each head of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from steps.config.peft import Peft
from steps.shapes import targets
from steps.shapes.memory import BYTES
from steps.shapes.model_config import ModelConfig

_WIDE, _INDEX = 4, 8  # float32, int64
#: Rows of the chunked cross-entropy (engine/train/loss.py) and of a block of attention (engine/model/attention.py).
_CHUNK_ROWS, _BLOCK_ROWS = 256, 64


@dataclass(frozen=True)
class Activations:
    """What one micro-batch of one process takes, in bytes.

    layers:    what the backward pass needs of each decoder layer.
    stream:    the input of each layer: all that is kept of it with recomputation.
    ends:      what lies before and behind the layers.
    logits:    the largest piece of logits with what is made of it, while it lasts.
    transient: beside what is kept, while one layer is walked backward.
    freed:     what a layer makes and lets go of again on its way forward, all of it together.
    """

    layers: tuple[int, ...]
    stream: int
    ends: int
    logits: int
    transient: int
    freed: int

    def kept(self, *, recompute: bool) -> int:
        """What stays from the forward to the backward pass."""
        return self.ends + (self.stream * len(self.layers) if recompute else sum(self.layers))

    def passing(self, *, recompute: bool) -> int:
        """The most that comes on top for a while: logits, or one layer (with recomputation: made again) backward."""
        again = max(self.layers, default=0) if recompute else 0
        return max(self.logits, again + self.transient)


def activations(
    section: Peft | None, model: ModelConfig, dtype: str, tokens: int, trained: int, longest: int
) -> Activations:
    """section: None where the model itself is trained: every linear keeps its input.   dtype:  of the computation.
    tokens:    of a micro-batch.   trained: those of them with a loss.   longest: tokens of the longest document.
    """
    width = BYTES[dtype]
    layers, has_gradient = [], section is None
    adapted = set() if section is None else set(targets.chosen(section, model.num_layers))
    for number in range(model.num_layers):
        kept, has_gradient = _layer(section, model, adapted, number, dtype, tokens, has_gradient)
        layers.append(kept)
    hidden = model.hidden_size
    ends = tokens * (
        _INDEX  # batches.MicroBatch: input_ids
        + model.kv_channels * width  # rotary.rotation: cos and sin, one pair for all layers
        + (hidden * width + _WIDE) * has_gradient  # pointwise._RMSNorm, the final one: its input, its scale
    ) + trained * (
        2 * _INDEX  # batches.MicroBatch: trained, targets; the former kept by the indexing of train.loss.batch_loss
        + hidden
        * width
        * has_gradient  # loss._ChunkedCrossEntropy: the gradient of its input, made in the forward pass
    )
    rows = min(_CHUNK_ROWS, trained)
    # loss._ChunkedCrossEntropy: one buffer in the compute dtype and, where that is another, a chunk in float32.
    logits = rows * model.vocab_size * (width + (_WIDE if width < _WIDE else 0))
    if section is None:  # loss._ChunkedCrossEntropy: the gradient of the output layer, and a chunk's part of it
        table = model.vocab_size * hidden
        ends, logits = ends + table * _WIDE, logits + table * width
    return Activations(
        tuple(layers), tokens * hidden * width, ends, logits, _transient(model, dtype, tokens, longest),
        _freed(model, dtype, tokens),
    )  # fmt: skip


def _layer(
    section: Peft | None,
    model: ModelConfig,
    adapted: set[str],
    number: int,
    dtype: str,
    tokens: int,
    has_gradient: bool,
) -> tuple[int, bool]:
    """Bytes that one decoder layer keeps, and whether its output has a gradient; has_gradient: whether its input has.

    Counted in values of the compute dtype (narrow) and of float32 (wide) for each token, in the order of computation.
    """
    hidden, heads, channels = model.hidden_size, model.num_attention_heads, model.kv_channels
    query, groups, ffn = model.query_size, model.num_query_groups, model.ffn_hidden_size
    narrow = wide = fixed = 0

    def linear(name: str) -> None:
        nonlocal narrow, fixed, has_gradient
        full, given = f"decoder.layers.{number}.{name}", has_gradient
        if section is None:
            narrow += targets.shape(model, full)[1]
            return
        parts = [part for part in {full: None, **dict.fromkeys(targets.parts(full))} if part in adapted]
        inputs = False
        for part in parts:
            kept = section.kept(number, *targets.shape(model, part), dtype, has_gradient=given)
            inputs |= kept.input
            narrow, fixed = narrow + kept.values, fixed + kept.fixed_bytes
        narrow += inputs * targets.shape(model, full)[1]  # once, however many parts see it
        has_gradient |= bool(parts)

    if has_gradient:
        narrow, wide = narrow + hidden, wide + 1  # pointwise._RMSNorm (linear_qkv's): its input, its scale
    linear("self_attention.linear_qkv")
    if has_gradient:
        if model.qk_layernorm:
            # pointwise._RMSNorm of query and key: views of linear_qkv's output, which stays whole; their scales
            narrow, wide = narrow + model.qkv_size, wide + heads + groups
        narrow += query + 2 * groups * channels  # attention._Blocked: q; k, v
    linear("self_attention.linear_proj")
    if has_gradient:
        narrow, wide = narrow + hidden, wide + 1  # pointwise._RMSNorm (linear_fc1's)
    linear("mlp.linear_fc1")
    if has_gradient:
        narrow += 2 * ffn  # pointwise._SwiGLU: its input
    linear("mlp.linear_fc2")
    return tokens * (narrow * BYTES[dtype] + wide * _WIDE) + fixed, has_gradient


def _transient(model: ModelConfig, dtype: str, tokens: int, longest: int) -> int:
    """The most that the backward pass of one layer holds at a time beside what was kept."""
    width, ffn, hidden = BYTES[dtype], model.ffn_hidden_size, model.hidden_size
    # pointwise._SwiGLU: gradients of input (2, in halves and as a whole) and output (1); less the input of linear_fc2
    # (1), which is gone by then. Beside it the gradient of the residual stream.
    mlp = tokens * width * ((2 + 2 + 1 - 1) * ffn + hidden)
    # attention._Blocked: gradients of output, query (compute dtype), key and value (float32) over all tokens; of one
    # block its scores, weights and their gradients. Beside it the gradient of the residual stream.
    keys = min(longest, tokens)
    block = _BLOCK_ROWS * keys * model.num_attention_heads * 4 * width
    attention = tokens * (
        width * (2 * model.query_size + hidden) + 2 * _WIDE * model.num_query_groups * model.kv_channels
    )
    return max(mlp, attention + block)


def _freed(model: ModelConfig, dtype: str, tokens: int) -> int:
    """What one layer makes on its way forward and nobody keeps."""
    width, hidden, query = BYTES[dtype], model.hidden_size, model.query_size
    turned = query + model.num_query_groups * model.kv_channels
    # pointwise._RMSNorm, twice: the squares, the normed values, and their input where it has to be widened first.
    wide = 2 * hidden * (2 if width == _WIDE else 3)
    # linear_qkv's output; rotary.rotate: six halves of queries and keys, and all of them; attention.attend: the scaled
    # query; linear_proj's and linear_fc2's outputs, which become part of the stream; pointwise._SwiGLU: silu(gate).
    narrow = model.qkv_size + 4 * turned + query + 2 * hidden + model.ffn_hidden_size
    return tokens * (wide * _WIDE + narrow * width)
