"""Causal attention inside each document of a packed row. No mask over the row exists: its cost would be tokens squared.

Three kernels, one meaning. `attend` picks: on CUDA in 16 bits FlashAttention over all documents of the row at once, in
float32 the memory-efficient one likewise; else blocks of rows as plain batched products. On a CPU (AVX-512,
one thread, 8 heads, two documents of 1,000 tokens) these take 92 ms forward and backward in bfloat16 where PyTorch's
fused one takes 133, and 128 against 147 in float32. A faster kernel has its place here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

#: Rows of a block. More of them compute more scores that the mask then hides; fewer make more calls.
BLOCK_ROWS = 64


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None = None) -> Tensor:
    """Grouped-query causal attention (arXiv 2305.13245).

    query:   [tokens, groups, heads per group, D];  key, value: [tokens, groups, D].
    lengths: tokens of each document; they add up to `tokens`.
    window:  how far a token sees, itself included; None: to the start of its document.
    Returns [tokens, heads * D].
    """
    if window is not None and window >= max(lengths):
        window = None
    if query.is_cuda and query.shape[-1] % 8 == 0:
        if query.dtype in (torch.float16, torch.bfloat16):
            return _flash(query, key, value, lengths, window)
        # With a window its gradients are wrong (PyTorch 2.11, by an order of magnitude).
        if query.dtype == torch.float32 and window is None:
            return _efficient(query, key, value, lengths)
    out: Tensor = _Blocked.apply(query, key, value, tuple(lengths), window)  # type: ignore[no-untyped-call]
    return out


# PyTorch's kernels that take the documents' bounds, called below the public functions: scaled_dot_product_attention
# knows no bounds, and torch.nn.attention.varlen, there since 2.10, changes from release to release.


def _flash(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """FlashAttention (arXiv 2307.08691), for 16 bits. It knows groups: keys and values are not repeated."""
    bounds, longest = _bounds(tuple(lengths), query.device), max(lengths)
    left, right = (None, None) if window is None else (window - 1, 0)
    found = torch.ops.aten._flash_attention_forward(
        query.flatten(1, 2), key, value, bounds, bounds, longest, longest, 0.0, True, False, window_size_left=left,
        window_size_right=right,
    )  # fmt: skip
    out: Tensor = found[0]
    return out.flatten(1)


def _efficient(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Memory-efficient attention (arXiv 2112.05682)."""
    bounds, longest = _bounds(tuple(lengths), query.device), max(lengths)
    k, v = (x.repeat_interleave(query.shape[2], dim=1)[None] for x in (key, value))
    found = torch.ops.aten._efficient_attention_forward(
        query.flatten(1, 2)[None], k, v, None, bounds, bounds, longest, longest, 0.0, _CAUSAL, True
    )
    out: Tensor = found[0]
    return out[0].flatten(1)


#: The kernel's name for: a row sees what comes before it, counted from the start of its document.
_CAUSAL = 1


@lru_cache(maxsize=2)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents begin and the last ends, [documents + 1] int32; made once for all layers of a row."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).pin_memory().to(device, non_blocking=True)


def _blocks(lengths: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first key, first row, end) of each block: rows [row, end) see keys [key, end)."""
    start = 0
    for length in lengths:
        for row in range(start, start + length, BLOCK_ROWS):
            key = start if window is None else max(start, row - window + 1)
            yield key, row, min(row + BLOCK_ROWS, start + length)
        start += length


def _weights(q: Tensor, k: Tensor, rows: int, window: int | None, later: Tensor) -> Tensor:
    """What each row of a block gives to each key: softmax of the masked scores, [groups, heads * rows, keys].

    q: [groups, heads * rows, D], already scaled.   later: [BLOCK_ROWS, BLOCK_ROWS], True above the diagonal.
    k: [groups, keys, D]; the last `rows` keys belong to the rows themselves.
    """
    groups, keys = k.shape[:2]
    scores = torch.bmm(q, k.transpose(1, 2))
    masked = scores.view(groups, -1, rows, keys)
    # Only among the rows themselves lies a key that comes later.
    masked[..., keys - rows :].masked_fill_(later[:rows, :rows], float("-inf"))
    if window is not None:
        row, key = (torch.arange(count, device=q.device) for count in (rows, keys))
        masked.masked_fill_(key <= row[:, None] + keys - rows - window, float("-inf"))
    # One pass over each row, which lies in the cache; sums are float32 inside, whatever the dtype.
    return torch.softmax(scores, dim=-1)


def _later(device: torch.device) -> Tensor:
    return torch.ones(BLOCK_ROWS, BLOCK_ROWS, dtype=torch.bool, device=device).triu_(1)


class _Blocked(torch.autograd.Function):
    """Rows in blocks; the heads of a group are folded into the rows, so that keys and values are never repeated.

    Keeps query, key and value; the backward pass computes the weights again (arXiv 2205.14135).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> Tensor:
        tokens, groups, heads, channels = query.shape
        q = (query * channels**-0.5).permute(1, 2, 0, 3).contiguous()
        k, v = (x.transpose(0, 1).contiguous() for x in (key, value))
        out, later = torch.empty_like(q), _later(q.device)
        for first, row, end in _blocks(lengths, window):
            block = q[:, :, row:end].reshape(groups, -1, channels)
            weights = _weights(block, k[:, first:end], end - row, window, later)
            out[:, :, row:end] = torch.bmm(weights, v[:, first:end]).view(groups, heads, -1, channels)
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.window = lengths, window
        return out.permute(2, 0, 1, 3).reshape(tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        groups, heads, tokens, channels = q.shape
        grad = grads[0].view(tokens, groups, heads, channels).permute(1, 2, 0, 3).contiguous()
        dq, later = torch.empty_like(q), _later(q.device)
        # A key collects from many blocks: in bfloat16 that sum would lose what the later blocks add.
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        for first, row, end in _blocks(ctx.lengths, ctx.window):
            block, g = (x[:, :, row:end].reshape(groups, -1, channels) for x in (q, grad))
            keys = k[:, first:end]
            weights = _weights(block, keys, end - row, ctx.window, later)
            d_weights = torch.bmm(g, v[:, first:end].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dv[:, first:end] += torch.bmm(weights.transpose(1, 2), g)
            dk[:, first:end] += torch.bmm(d_scores.transpose(1, 2), block)
            dq[:, :, row:end] = torch.bmm(d_scores, keys).view(groups, heads, -1, channels)
        dq = (dq * channels**-0.5).permute(2, 0, 1, 3)
        return dq, dk.to(k.dtype).transpose(0, 1), dv.to(v.dtype).transpose(0, 1), None, None
