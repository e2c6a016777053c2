"""Ids of many pieces of text in one call.

Handing pieces to a tokenizer one by one costs more than their tokens when they are short: chitchat has 30 tokens a
message. So the pieces of a conversation are joined by a token that means "cut here", the text between two of them is
tokenized by itself, and the cuts are taken out of the ids again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, processors

#: Where texts are cut: a code point that Unicode promises never to make a character.
CUT = "\U0010ffff"


class Encoded(NamedTuple):
    """ids: int32 [tokens], piece after piece. lengths: int64 [pieces], the tokens of each."""

    ids: np.ndarray
    lengths: np.ndarray


class Segments(Protocol):
    """Tokenizes the pieces of several conversations, each piece by itself."""

    def encode(self, rows: Sequence[Sequence[str]]) -> Encoded:
        """The ids of all pieces of all rows, in order."""


class TokenizersSegments:
    """Segments by the library that the tokenizer comes with.

    backend: the tokenizer with CUT as a token of its own, and with characters' positions as they are.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._alone = backend
        self.backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(backend.to_str())
        # It would take blanks out of the characters' positions, which `proofs` compares.
        self.backend.post_processor = processors.Sequence([])
        self.backend.add_special_tokens([AddedToken(CUT, special=True, normalized=False)])
        cut = self.backend.token_to_id(CUT)
        assert cut is not None
        self._cut = cut

    def encode(self, rows: Sequence[Sequence[str]]) -> Encoded:
        """The ids of all pieces of all rows, in order."""
        ids = _ids(self.backend, [CUT.join([*row, ""]) for row in rows])
        found = take_cuts(ids, self._cut, sum(map(len, rows)))
        return self.encode_apart(list(chain.from_iterable(rows))) if found is None else found

    def encode_apart(self, pieces: Sequence[str]) -> Encoded:
        """The same, each piece by a call of its own: slower, and free of cuts."""
        parts = [_ids(self._alone, [piece]) for piece in pieces]
        return Encoded(np.concatenate([np.zeros(0, np.int32), *parts]), np.asarray([len(part) for part in parts], int))


def _ids(backend: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    found = backend.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(text.ids, np.int32) for text in found)])


def take_cuts(ids: np.ndarray, cut: int, pieces: int) -> Encoded | None:
    """Ids of `pieces` pieces, each of them ended by `cut`; None when a text has a cut of its own in it."""
    at = np.flatnonzero(ids == cut)
    if len(at) != pieces:
        return None
    return Encoded(np.delete(ids, at), np.diff(at, prepend=-1) - 1)


def merged(second: np.ndarray, first: Encoded, other: Encoded) -> Encoded:
    """The pieces of two encodings in their order. second: bool [pieces], which of them stand in `other`."""
    lengths = np.empty(len(second), np.int64)
    lengths[~second], lengths[second] = first.lengths, other.lengths
    of_other = np.repeat(second, lengths)
    ids = np.empty(len(of_other), np.int32)
    ids[~of_other], ids[of_other] = first.ids, other.ids
    return Encoded(ids, lengths)


def same_ids(one: Encoded, other: Encoded) -> bool:
    """Whether two encodings are the same, piece by piece."""
    return bool(np.array_equal(one.ids, other.ids) and np.array_equal(one.lengths, other.lengths))
