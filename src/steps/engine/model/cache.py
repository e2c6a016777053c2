"""Keys and values of texts that grow token by token, so that each token passes through the layers once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steps.engine.model.decoder import Decoder
from steps.engine.model.layers import Documents, SelfAttention


class Cache:
    """What the attention of every layer has seen of a batch of texts, none of them padded."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        """capacity: tokens that the longest text may come to."""
        self._decoder, self._capacity = decoder, capacity
        # By layer: [texts, groups, capacity, D] each. A text's tokens lie at the beginning of its row.
        self._keys: dict[SelfAttention, Tensor] = {}
        self._values: dict[SelfAttention, Tensor] = {}
        self.lengths = torch.empty(0, dtype=torch.int64)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts, each as if it were alone. Returns the last hidden state of each, [texts, hidden]."""
        device = self._decoder.output_weight.device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ends = self.lengths.cumsum(0)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        packed = self._decoder.documents([0, *ends.tolist()], len(ids))
        hidden = self._decoder.through_layers(ids, _Prompts(packed.lengths, packed.cos, packed.sin, self))
        return hidden[ends - 1]

    def append(self, tokens: Tensor) -> Tensor:
        """Read one more token of each text, [texts]. Returns the hidden state of each, [texts, hidden]."""
        growing = _Growing((1,) * len(tokens), *self._decoder.rotation(self.lengths), self)
        hidden = self._decoder.through_layers(tokens, growing)
        self.lengths = self.lengths + 1
        return hidden

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts only, [n] ascending."""
        self.lengths = self.lengths[texts]
        for held in (self._keys, self._values):
            for layer in held:
                held[layer] = held[layer][texts]

    def store(self, layer: SelfAttention, key: Tensor, value: Tensor, lengths: Sequence[int]) -> None:
        """Take over what a layer has made of the prompts: key, value [tokens, groups, D]."""
        for held, made in ((self._keys, key), (self._values, value)):
            groups, channels = made.shape[1:]
            # Zeros: what nothing was written to is weighed with 0, and 0 times NaN would be NaN.
            held[layer] = made.new_zeros(len(lengths), groups, self._capacity, channels)
            for row, part in zip(held[layer], torch.split(made, list(lengths)), strict=True):
                row[:, : len(part)] = part.transpose(0, 1)

    def extended(self, layer: SelfAttention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add key and value [texts, groups, D] of the next token of each text.

        Returns those of all tokens so far, [texts, groups, longest, D]; what lies behind a text's end means nothing.
        """
        texts, longest = torch.arange(len(key), device=key.device), int(self.lengths.max()) + 1
        for held, made in ((self._keys, key), (self._values, value)):
            held[layer][texts, :, self.lengths] = made
        return self._keys[layer][:, :, :longest], self._values[layer][:, :, :longest]


@dataclass(frozen=True)
class _Prompts(Documents):
    """Whole texts, which a cache remembers."""

    cache: Cache

    def attend(self, layer: SelfAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.cache.store(layer, key, value, self.lengths)
        return super().attend(layer, query, key, value)


@dataclass(frozen=True)
class _Growing(Documents):
    """The next token of every text that a cache holds."""

    cache: Cache

    def attend(self, layer: SelfAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.extended(layer, key, value)
        position, end = torch.arange(keys.shape[2], device=keys.device), self.cache.lengths[:, None]
        hidden = position > end
        if layer.window is not None:
            hidden |= position <= end - layer.window
        # Query: [texts, groups, heads of a group, D], so that keys and values are never repeated.
        scores = query * query.shape[-1] ** -0.5 @ keys.transpose(2, 3)
        scores.masked_fill_(hidden[:, None, None], float("-inf"))
        return (torch.softmax(scores, dim=-1) @ values).flatten(1)
