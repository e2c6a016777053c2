"""What the factors of an adapter can start as: drawn, taken from the weight, or taken from the activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steps.engine.adapters.base import Adapters
from steps.engine.data.batches import MicroBatch

#: Up to here the principal vectors come from an exact eigendecomposition; beyond, from 16 subspace iterations.
_EXACT = 2048


def matrix(how: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A [rows, columns] float32 matrix drawn as `lora_A_init_method` says."""
    weight = torch.empty(rows, columns)
    if how == "xavier":
        return nn.init.xavier_normal_(weight, generator=generator)
    if how == "uniform":
        return nn.init.xavier_uniform_(weight, generator=generator)
    assert how == "kaiming", how
    return nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)


def principal(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """PiSSA's A [rank, in] and B [out, rank]: scale * B A is the best rank-`rank` approximation of weight [out, in].

    arXiv 2404.02948, equations 2 and 3: A = S^1/2 V^T, B = U S^1/2 of the principal singular triplets, over scale.
    """
    if min(weight.shape) > _EXACT:
        left, values, right = _subspace(weight, rank, generator)
    else:
        # Of the Gram matrix of the shorter side, in float64: its eigenvalues are squares, and half the digits are lost.
        wide = weight.double()
        gram = wide.T @ wide if weight.shape[0] >= weight.shape[1] else wide @ wide.T
        squares, vectors = torch.linalg.eigh(gram)
        values, vectors = squares[-rank:].flip(0).clamp_min(0).sqrt(), vectors[:, -rank:].flip(1)
        if weight.shape[0] >= weight.shape[1]:
            left, right = wide @ vectors / values.clamp_min(1e-30), vectors
        else:
            left, right = vectors, wide.T @ vectors / values.clamp_min(1e-30)
    root = (values / scale).sqrt()
    return (root[:, None] * right.T).float().contiguous(), (left * root).float().contiguous()


def _subspace(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        left, values, right = torch.svd_lowrank(weight, q=min(rank + 16, *weight.shape), niter=16)
    return left[:, :rank], values[:rank], right[:, :rank]


def qr(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """OLoRA's A [rank, in] and B [out, rank]: first rows of R and columns of Q, weight = Q R (arXiv 2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def activations(adapters: Adapters, batches: Sequence[MicroBatch], rank: int) -> Mapping[str, Tensor]:
    """For each adapted linear, the `rank` directions [rank, in] float32 in which its inputs are largest.

    The right singular vectors of all inputs (one row a token), found batch by batch: what is kept of the rows so far is
    their leading part, twice the rank (arXiv 2410.07170, section 3.1). linear_qkv and linear_fc1 see normalized inputs.
    """
    kept: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].detach().float()
            if name in kept:
                rows = torch.cat((kept[name], rows))
            kept[name] = _leading(rows, 2 * rank)

        return seen

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in adapters.modules.items()]
    was_training = adapters.decoder.training
    adapters.decoder.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                adapters.decoder.hidden_states(batch.input_ids, batch.cu_seqlens)
    finally:
        adapters.decoder.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: nn.functional.normalize(rows[:rank], dim=1) for name, rows in kept.items()}


def _leading(rows: Tensor, rank: int) -> Tensor:
    """S V^T of the leading `rank` singular triplets of rows [n, in], the largest first: [min(rank, n, in), in]."""
    gram = rows.double() @ rows.double().T if len(rows) < rows.shape[1] else rows.double().T @ rows.double()
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares[-rank:].flip(0).clamp_min(0), vectors[:, -rank:].flip(1)
    if len(rows) < rows.shape[1]:
        leading: Tensor = vectors.T @ rows.double()
    else:
        leading = squares.sqrt()[:, None] * vectors.T
    return leading.float()
