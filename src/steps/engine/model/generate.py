"""Greedy decoding, for a look at what a model has learned."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from steps.engine.model.decoder import Decoder


@torch.no_grad()
def greedy(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, stop: Collection[int] = ()) -> list[int]:
    """The tokens that follow `prompt`, each the likeliest, up to and without one of `stop`.

    The whole text is computed again for every token: fine for a sample, too slow for serving.
    """
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        hidden = decoder.hidden_states(torch.tensor(tokens, device=decoder.output_weight.device), [0, len(tokens)])
        token = int((decoder.output_weight @ hidden[-1]).argmax())
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
