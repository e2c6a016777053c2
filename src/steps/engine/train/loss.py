"""Cross-entropy over the trained tokens without ever holding their logits all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steps.engine.data.batches import MicroBatch
from steps.engine.model.decoder import Decoder
from steps.engine.model.fusion import fused

#: Logits [rows, vocab] that exist at a time: 256 rows of a 128k vocabulary are 131 MB in float32.
CHUNK_ROWS = 256


@fused
def _softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Make softmax(logits) of logits [n, vocab], in place; returns the loss of each row, [n, 1], float32 or wider.

    targets: [n, 1].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1, keepdim=True)
    chosen = wide.gather(1, targets)
    weights = wide.sub_(largest).exp_()
    sums = weights.sum(-1, keepdim=True)
    logits.copy_(weights.div_(sums))
    return sums.log() + largest - chosen


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64 if hidden.device.type == "cpu" else wide, device=hidden.device)
        # The gradient is made here, while a chunk's logits are at hand; the backward pass only scales it.
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        # One buffer for all chunks: fresh memory costs as much as the softmax.
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = torch.mm(part, weight.T, out=buffer[: len(part)])
            losses = _softmax(logits, target)
            total += losses.sum(dtype=total.dtype)
            if gradient is not None or d_weight is not None:
                # Less 1 at the target: exp(-loss) - 1 without the rounding of a probability near 1. By index, since
                # scatter_ copies all of a bfloat16 tensor.
                row = torch.arange(len(part), device=part.device)
                logits[row, target[:, 0]] = torch.expm1(-losses[:, 0]).to(logits.dtype)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[start : start + rows])
            if d_weight is not None:
                d_weight += logits.T @ part
        ctx.save_for_backward(gradient, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient, d_weight = ctx.saved_tensors
        if gradient is not None:
            gradient = gradient * grads[0].to(gradient.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grads[0].to(d_weight.dtype)).to(ctx.weight_dtype)
        return gradient, d_weight, None, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = CHUNK_ROWS) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], a scalar (float64 on a CPU); no tokens: 0.

    hidden: [n, hidden]; weight: [vocab, hidden]; targets: [n] int64. Logits are [rows, vocab] at most.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
    return total


def batch_loss(decoder: Decoder, batch: MicroBatch) -> Tensor:
    """Sum of the loss over the micro-batch's trained tokens, a scalar."""
    hidden = decoder.hidden_states(batch.input_ids, batch.cu_seqlens)
    return cross_entropy_sum(hidden[batch.trained], decoder.output_weight, batch.targets)
