"""A byte-level BPE from a tokenizer.json in tiktoken's terms, where both are the same function of the text.

`tokenizers` joins the neighbours that come first in a list of merges; tiktoken those that together make the first token
of a list. Let the rank of a token be the place of its first merge. The two agree if, for every token,

- the merges that make it stand together in the list, and
- the merges made of lower ranks alone take the token's own text to the token.

For take the first moment at which they would differ, x and y in between becoming the token t in tiktoken but not by a
merge. No join has crossed the bounds of x + y, so what happened between them is what happens to t's text alone; that
came to two parts which are a merge of t, and x and y are these. By the same argument merges with a part of a higher
rank never come about. Tokens that their own text does not become (`ignore_merges` finds them as whole words) must stay
three parts or more: then nothing joins to them in either library.

All else that decides ids (pattern, normalizer, added tokens) is taken over or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from steps.engine.data.segments import CUT
from steps.engine.data.tokenizer import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: The same where digits were cut out one by one before: a digit ends the text for what stands before it.
_GPT2_BETWEEN_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # fmt: skip


class UnfitError(Exception):
    """tiktoken cannot stand in for this tokenizer. The text says why."""


@dataclass(frozen=True)
class Ranks:
    """What tiktoken is made of.

    mergeable: bytes of a token -> rank; all 256 single bytes are there.
    special:   text of an added token, and CUT -> rank.
    ids:       int32 [ranks], the vocabulary's id of each rank; -1 for CUT and for bytes that the vocabulary lacks.
    normalized: texts are brought to NFC first.
    """

    mergeable: Mapping[bytes, int]
    special: Mapping[str, int]
    ids: np.ndarray
    pattern: str
    normalized: bool

    @property
    def cut(self) -> int:
        """The rank of CUT."""
        return self.special[CUT]


def rebuild(tokenizer: Tokenizer) -> Ranks:
    """The ranks of a tokenizer. Raises UnfitError."""
    description = tokenizer.description
    model = description["model"]
    if model.get("type") != "BPE":
        raise UnfitError(f"its model is {model.get('type')}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnfitError(f"its model has {key}")
    normalizing = description.get("normalizer") or {}
    normalizer = None if normalizing.get("normalizers") == [] else normalizing.get("type")
    if normalizer not in (None, "NFC"):
        raise UnfitError(f"its normalizer is {normalizer}")
    pattern = _pattern(description.get("pre_tokenizer"))
    added = _added(description.get("added_tokens", ()), normalizer is not None)
    vocab: Mapping[str, int] = model["vocab"]
    merges = [(left, right) for left, right in map(_pair, model["merges"])]
    texts = _ranked(tokenizer.backend, vocab, merges, set(added), ignore_merges=bool(model.get("ignore_merges")))
    letters = _byte_letters()
    if strange := set("".join(texts)) - set(map(chr, letters)):
        raise UnfitError(f"its vocabulary is not one of bytes ({min(strange)!r} stands for none)")
    mergeable = {text.translate(letters).encode("latin-1"): rank for rank, text in enumerate(texts)}
    special = {text: len(texts) + number for number, text in enumerate([*added, CUT])}
    ids = np.asarray([*(vocab.get(text, -1) for text in texts), *added.values(), -1], np.int32)
    return Ranks(mergeable, special, ids, pattern, normalizer is not None)


def _pair(merge: Any) -> Sequence[str]:
    """A merge, which older files write as one text."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge  # type: ignore[no-any-return]


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level vocabularies write for a byte -> that byte, for str.translate (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{256 + at: chr(byte) for at, byte in enumerate(hidden)}}


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The regular expression whose matches are the words."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UnfitError("its pre-tokenizer does not end with bytes as they are")
    by_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_regex:
        return _GPT2
    if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0]["individual_digits"]:
        return _GPT2_BETWEEN_DIGITS
    if kinds == ["Split", "ByteLevel"] and not by_regex:
        how = (steps[0]["behavior"], steps[0]["invert"])
        if "Regex" in steps[0]["pattern"] and how in (("Isolated", False), ("Removed", True)):
            return str(steps[0]["pattern"]["Regex"])
    raise UnfitError(f"words are cut in a way that one pattern cannot say ({', '.join(kinds)})")


def _added(entries: Any, normalized: bool) -> dict[str, int]:
    """Added tokens -> ids. tiktoken takes the first that matches, `tokenizers` the longest: none may touch another."""
    for entry in entries:
        if entry["single_word"] or entry["lstrip"] or entry["rstrip"]:
            raise UnfitError(f"the added token {entry['content']!r} takes its surroundings into account")
        if normalized and entry["normalized"] and not entry["content"].isascii():
            raise UnfitError(f"the added token {entry['content']!r} is normalized")
    texts = [entry["content"] for entry in entries]
    heads = {text[:end] for text in texts for end in range(1, len(text))}
    for text in texts:
        if any(text[start:] in heads for start in range(1, len(text))) or sum(text in other for other in texts) > 1:
            raise UnfitError(f"the added token {text!r} overlaps with another")
    return {entry["content"]: entry["id"] for entry in entries}


def _ranked(
    backend: tokenizers.Tokenizer,
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: set[str],
    *,
    ignore_merges: bool,
) -> list[str]:
    """The tokens in the order of their ranks, as the vocabulary writes them; see the module's text for the proof."""
    ranks = {chr(letter): rank for rank, letter in enumerate(_byte_letters())}
    ordered = True  # no merge has a part of a higher rank
    kept, last = [], ""
    for left, right in merges:
        token = left + right
        if token not in ranks:
            ranks[token] = len(ranks)
        elif token != last:
            raise UnfitError(f"the merges of {token!r} do not stand together")
        last = token
        lower = left in ranks and right in ranks and max(ranks[left], ranks[right]) < ranks[token]
        kept += [(left, right)] if lower else []
        ordered &= lower
    plain = backend.model if not ignore_merges else _bpe(vocab, merges)
    alone = plain if ordered else _bpe(vocab, kept)
    made = [token for token in ranks if len(token) == 1 or len(alone.tokenize(token)) == 1]
    left_over = (vocab.keys() - added | ranks.keys()) - set(made)
    for token in left_over:
        parts = len(plain.tokenize(token))
        if parts == 1 or (parts == 2 and ignore_merges):
            raise UnfitError(f"{token!r} is joined from other tokens than its merges say")
    return [*made, *(sorted(left_over, key=vocab.__getitem__) if ignore_merges else ())]


def _bpe(vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> models.BPE:
    return models.BPE(dict(vocab), merges)
