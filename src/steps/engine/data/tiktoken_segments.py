"""Segments by tiktoken: the ids of the tokenizer's own library in a quarter of its time, or its own where in doubt.

`tiktoken_ranks` proves that words become the same tokens. That the two libraries cut texts into the same words is seen
character by character: they carry editions of Unicode of their own, and a letter of a later one is no letter to the
other. Text with a character that they see differently, or that is not in the form the normalizer makes, goes the old
way.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import numpy as np

from steps.engine.data.segments import CUT, Encoded, TokenizersSegments, merged, take_cuts
from steps.engine.data.tiktoken_ranks import Ranks, UnfitError

#: What stands around a character where both libraries are asked where they cut; {0} is the character.
_AROUND = ("{0}", " {0}", "a{0}b {0}", "1{0}2", "!{0}?", "'{0}e", "\n{0}\n {0}", "{0}{0} {0}", "  {0}  ", "A{0}s'{0}")


class TiktokenSegments:
    """Segments by tiktoken. plain: what does the rest. Raises UnfitError where tiktoken refuses the pattern or cuts
    ASCII characters differently."""

    def __init__(self, ranks: Ranks, plain: TokenizersSegments) -> None:
        import tiktoken  # here, so that a run without it does not need it

        self._ranks, self.plain = ranks, plain
        try:
            self._encoding = tiktoken.Encoding(
                "steps",
                pat_str=ranks.pattern,
                mergeable_ranks=dict(ranks.mergeable),
                special_tokens=dict(ranks.special),
            )
        except ValueError as error:
            raise UnfitError(f"tiktoken does not understand its pattern: {error}") from error
        self._alike: set[str] = {CUT}
        self._unlike: set[str] = set()
        ascii_characters = list(map(chr, range(128)))
        if not self._cut_alike(ascii_characters):
            differing = [text for text in ascii_characters if not self._cut_alike([text])]
            raise UnfitError(f"tiktoken cuts words differently at {', '.join(map(repr, differing))}")

    def encode(self, rows: Sequence[Sequence[str]]) -> Encoded:
        """The ids of all pieces of all rows, in order."""
        pieces = list(chain.from_iterable(rows))
        slow = np.zeros(len(pieces), bool)
        if not self._is_alike("".join(pieces)):
            slow[:] = [not self._is_alike(piece) for piece in pieces]
        fast = self._encode([pieces[at] for at in np.flatnonzero(~slow)] if slow.any() else pieces)
        if fast is None:
            return self.plain.encode(rows)
        if len(fast.ids) and fast.ids.min() < 0:  # bytes that the vocabulary lacks
            lacking = np.zeros(len(fast.lengths), bool)
            lacking[np.repeat(np.arange(len(lacking)), fast.lengths)[fast.ids < 0]] = True
            fast = Encoded(fast.ids[~np.repeat(lacking, fast.lengths)], fast.lengths[~lacking])
            slow[~slow] = lacking
        if not slow.any():
            return fast
        return merged(slow, fast, self.plain.encode([[pieces[at] for at in np.flatnonzero(slow)]]))

    def _encode(self, pieces: Sequence[str]) -> Encoded | None:
        """By tiktoken; -1 for bytes that the vocabulary lacks. None where a text has a cut of its own in it, or where
        the pattern gives up: it goes back and forth over runs of a million blanks."""
        try:
            ranks = self._encoding.encode_to_numpy(CUT.join([*pieces, ""]), allowed_special="all")
        except ValueError:
            return None
        found = take_cuts(ranks, self._ranks.cut, len(pieces))
        return None if found is None else Encoded(self._ranks.ids[found.ids], found.lengths)

    def _is_alike(self, text: str) -> bool:
        """Whether both libraries are known to cut this text into the same words."""
        if text.isascii():
            return True
        if not self._alike.issuperset(text):
            self._look_at(set(text) - self._alike - self._unlike)
            if not self._alike.issuperset(text):
                return False
        return not self._ranks.normalized or unicodedata.is_normalized("NFC", text)

    def _look_at(self, characters: set[str]) -> None:
        # A character that this Python's Unicode has not heard of may have a normal form that it does not know.
        known = {text for text in characters if unicodedata.category(text) != "Cn"}
        if not self._cut_alike(known):
            known = {text for text in known if self._cut_alike([text])}
        self._alike |= known
        self._unlike |= characters - known

    def _cut_alike(self, characters: Iterable[str]) -> bool:
        """Whether both libraries cut texts with these characters at the same places."""
        import tiktoken

        texts = [around.format(text) for text in characters for around in _AROUND]
        # A vocabulary with every part of every text: tiktoken looks a word up before it joins anything, so each word
        # is one token, as long as the word.
        parts = {
            text[start:end].encode()
            for text in texts
            for start in range(len(text))
            for end in range(start + 1, len(text) + 1)
        } | {bytes([byte]) for byte in range(256)}
        ruler = tiktoken.Encoding(
            "ruler", pat_str=self._ranks.pattern, special_tokens={},
            mergeable_ranks={part: rank for rank, part in enumerate(sorted(parts))},
        )  # fmt: skip
        pre_tokenizer = self.plain.backend.pre_tokenizer
        for text in texts:
            words = [ruler.decode_single_token_bytes(rank) for rank in ruler.encode_ordinary(text)]
            ends = list(accumulate(map(len, words)))
            cuts = [end for _, (_, end) in pre_tokenizer.pre_tokenize_str(text)]
            if b"".join(words) != text.encode() or [len(text[:cut].encode()) for cut in cuts] != ends:
                return False
        return True
