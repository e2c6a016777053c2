"""Text that follows a prompt: greedy or sampled, many prompts at a time, each token computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steps.engine.model.cache import Cache
from steps.engine.model.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: logits are divided by it; 0: the likeliest token always (greedy).
    top_k: only the k likeliest tokens.   top_p: only the likeliest that together have this probability
    (nucleus sampling, arXiv 1904.09751), after temperature and top_k.
    seed: of the draws. Each prompt has a stream of its own, so that others beside it do not change its answer.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


GREEDY = Sampling()


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = GREEDY,
    first: int = 0,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without one of `stop`, max_new_tokens at most.

    prompts: ids, at least one each.   first: number of the first prompt among all, for its stream of random numbers.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    streams = [_stream(sampling.seed, first + number) for number in range(len(prompts))]
    cache = Cache(decoder, max(map(len, prompts)) + max_new_tokens)
    hidden, going = cache.begin(prompts), list(range(len(prompts)))
    for count in range(max_new_tokens):
        logits = (hidden @ decoder.output_weight.T).float()
        tokens = _chosen(logits, sampling, [streams[text] for text in going])
        kept = [place for place, token in enumerate(tokens) if token not in stop]
        for place in kept:
            answers[going[place]].append(tokens[place])
        if not kept or count + 1 == max_new_tokens:
            break
        if len(kept) < len(going):
            cache.keep(torch.tensor(kept, device=hidden.device))
            going = [going[place] for place in kept]
        hidden = cache.append(torch.tensor([tokens[place] for place in kept], device=hidden.device))
    return answers


def _chosen(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> list[int]:
    """The next token of each text. logits: [texts, vocab] float32."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = torch.softmax(_cut(logits / sampling.temperature, sampling), dim=-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=stream) for row, stream in zip(probabilities, streams, strict=True)]
    return torch.cat(drawn).tolist()


def _cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """-inf for the tokens that top_k and top_p leave out."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:  # sums of all may round to more than 1
        ordered, places = logits.sort(dim=-1, descending=True)
        shares = torch.softmax(ordered, dim=-1)
        # The token that crosses the bound still belongs; the likeliest one always does.
        out = shares.cumsum(-1) - shares >= sampling.top_p
        logits = logits.masked_fill(out.scatter(-1, places, out), float("-inf"))
    return logits


def _stream(seed: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:sample:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
