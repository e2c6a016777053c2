"""Causal attention inside each document of a packed row. No mask over the row exists: its cost would be tokens squared.

Two kernels, one meaning. `attend` picks: on CUDA the fused one of PyTorch, document by document; everywhere else, and
for sliding windows, blocks of rows as plain batched products, which on a CPU are as fast in float32 and twice as fast
in bfloat16. A faster kernel has its place here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

BLOCK_ROWS = 128


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None = None) -> Tensor:
    """Grouped-query causal attention (arXiv 2305.13245).

    query:   [tokens, groups, heads per group, D];  key, value: [tokens, groups, D].
    lengths: tokens of each document; they add up to `tokens`.
    window:  how far a token sees, itself included; None: to the start of its document.
    Returns [tokens, heads * D].
    """
    if query.is_cuda and (window is None or max(lengths) <= window):
        return _fused(query, key, value, lengths)
    out: Tensor = _Blocked.apply(query, key, value, tuple(lengths), window)  # type: ignore[no-untyped-call]
    return out


def _fused(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    heads = query.shape[1] * query.shape[2]
    # One split node: slicing per document would cost a full-size gradient buffer for each of them.
    parts = []
    for q, k, v in zip(*(torch.split(x, list(lengths)) for x in (query, key, value)), strict=True):
        q = q.flatten(1, 2).transpose(0, 1)[None]
        k, v = (x.transpose(0, 1)[None].repeat_interleave(heads // key.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        parts.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _blocks(lengths: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int]]:
    """(first key, first row, end) of each block: rows [row, end) see keys [key, end)."""
    start = 0
    for length in lengths:
        for row in range(start, start + length, BLOCK_ROWS):
            key = start if window is None else max(start, row - window + 1)
            yield key, row, min(row + BLOCK_ROWS, start + length)
        start += length


def _scores(q: Tensor, k: Tensor, rows: int, window: int | None) -> Tensor:
    """Scaled and masked scores of one block, float32 or wider.

    q: [groups, heads * rows, D], already scaled.
    k: [groups, keys, D]; the last `rows` keys belong to the rows themselves.
    """
    groups, keys = k.shape[:2]
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(groups, -1, rows, keys)
    row = torch.arange(rows, device=q.device)[:, None]
    # Only among the rows themselves lies a key that comes later.
    scores[..., keys - rows :].masked_fill_(torch.arange(rows, device=q.device) > row, float("-inf"))
    if window is not None:
        scores.masked_fill_(torch.arange(keys, device=q.device) <= row + keys - rows - window, float("-inf"))
    return scores


class _Blocked(torch.autograd.Function):
    """Rows in blocks; the heads of a group are folded into the rows, so that keys and values are never repeated.

    Keeps the output and one log-sum-exp a row; the backward pass computes the scores again (arXiv 2205.14135).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> Tensor:
        tokens, groups, heads, channels = query.shape
        q = (query * channels**-0.5).permute(1, 2, 0, 3).contiguous()
        k, v = (x.transpose(0, 1).contiguous() for x in (key, value))
        out = torch.empty_like(q)
        sums = torch.empty(groups, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for first, row, end in _blocks(lengths, window):
            block = q[:, :, row:end].reshape(groups, -1, channels)
            scores = _scores(block, k[:, first:end], end - row, window)
            total = torch.logsumexp(scores, dim=-1, keepdim=True)
            weights = scores.sub_(total).exp_().to(v.dtype).view(groups, -1, end - first)
            out[:, :, row:end] = torch.bmm(weights, v[:, first:end]).view(groups, heads, -1, channels)
            sums[:, :, row:end] = total.squeeze(-1)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.lengths, ctx.window = lengths, window
        return out.permute(2, 0, 1, 3).reshape(tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, sums = ctx.saved_tensors
        groups, heads, tokens, channels = q.shape
        grad = grads[0].view(tokens, groups, heads, channels).permute(1, 2, 0, 3).contiguous()
        delta = (grad.to(sums.dtype) * out.to(sums.dtype)).sum(-1)
        dq = torch.empty_like(q)
        # A key collects from many blocks: in bfloat16 that sum would lose what the later blocks add.
        dk, dv = (torch.zeros_like(x, dtype=sums.dtype) for x in (k, v))
        for first, row, end in _blocks(ctx.lengths, ctx.window):
            block, g = (x[:, :, row:end].reshape(groups, -1, channels) for x in (q, grad))
            scores = _scores(block, k[:, first:end], end - row, ctx.window)
            weights = scores.sub_(sums[:, :, row:end, None]).exp_()
            d_weights = torch.bmm(g, v[:, first:end].transpose(1, 2)).view_as(weights)
            d_scores = d_weights.to(sums.dtype).sub_(delta[:, :, row:end, None]).mul_(weights)
            low, d_low = (x.to(q.dtype).view(groups, -1, end - first) for x in (weights, d_scores))
            dv[:, first:end] += torch.bmm(low.transpose(1, 2), g)
            dk[:, first:end] += torch.bmm(d_low.transpose(1, 2), block)
            dq[:, :, row:end] = torch.bmm(d_low, k[:, first:end]).view(groups, heads, -1, channels)
        dq = (dq * channels**-0.5).permute(2, 0, 1, 3)
        return dq, dk.to(k.dtype).transpose(0, 1), dv.to(v.dtype).transpose(0, 1), None, None
