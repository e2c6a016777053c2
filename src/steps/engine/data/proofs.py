"""What is tried on the first rows before a fast way of tokenizing is taken for all of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from steps.engine.data.chat import Conversation, DroppedError
from steps.engine.data.encoding import Encoder, Row
from steps.engine.data.segments import CUT, same_ids
from steps.engine.data.tiktoken_ranks import Ranks, UnfitError, rebuild
from steps.engine.data.tiktoken_segments import TiktokenSegments
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizing import Settings
from steps.engine.progress import Progress
from steps.errors import StepFailed

_PROBE_ROWS, _PROBE_CHARACTERS = 64, 50_000
#: Bytes of input for each entry of the vocabulary from which on tiktoken saves more time than its proof takes: with
#: 49,000 entries half a second, in which `tokenizers` gets through 2 MB.
_TIKTOKEN_PAYS = 100
#: How many tokens on each side of a cut may differ from those of the whole text (merges across the cut).
_NEAR_CUT = 4
#: Texts that have come out differently somewhere: blanks, digits, marks, apostrophes, scripts, half of a pair.
NASTY = (
    "", " ", "\n", "  \n\n  x", "a  b   c    ", "\t\t  \t", "\r\n\r\n x", "\x00\x01\x1c\x85\xa0\u2003\u3000 z",
    "12345 6 78", " 1 22  333", "x1y2 3z", "½ ² ٣ ४ Ⅷ 一二", "don't DON'T we'll I'd 'S 'ſ it’s", "''' ''s 'tis",
    "naïve cafe\u0301 e\u0301\u0323", "日本語 中文。한국어", "नमस्ते ไทย עברית العربية",
    "🙂🙃 👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f",
    "\ufeffBOM \u200b\u200d\u2060", "ﬁ ﬀ \u212b \u2126 \u212a", "a" * 300, " " * 300, "\n" * 300, "=-" * 150,
    "x = {'a': [1, 2.5e-3]};  // ok\n\tif (!y) return;\n", "https://a.b/c?d=e&f=%20#g", "\U000e0001\ufffd\U0010fffe",
)  # fmt: skip


def probe(
    tokenizer: Tokenizer, settings: Settings, conversations: Iterable[Conversation], size: int, progress: Progress
) -> tuple[Settings, Ranks | None]:
    """Try the fast ways on the first rows and leave those that do not give the exact result.

    size: bytes of the input. Returns the settings and, where tiktoken is to be used, what it needs.
    Raises StepFailed (`tiktoken_unfit`) where tiktoken is asked for and does not fit.
    """
    encoder = Encoder(tokenizer, settings.loss)
    exact = Encoder(tokenizer, settings.loss, stream=False)
    rows: list[Row] = []
    for conversation in islice(conversations, _PROBE_ROWS):
        if sum(len(row.text) for row in rows) > _PROBE_CHARACTERS:
            break
        row, slow = _rendered(encoder, conversation), _rendered(exact, conversation)
        if row != slow and settings.stream:
            progress.log("finding answers by rendering every prefix: this template depends on what comes later")
            settings = replace(settings, stream=False)
        if slow is not None:
            rows.append(slow)
    if not settings.whole_text and not segments_fit(tokenizer, rows):
        progress.log("tokenizing whole conversations: this tokenizer does not take them in segments")
        settings = replace(settings, whole_text=True)
    return settings, _tiktoken(tokenizer, settings, rows, size, progress)


def _tiktoken(
    tokenizer: Tokenizer, settings: Settings, rows: Sequence[Row], size: int, progress: Progress
) -> Ranks | None:
    """What tiktoken needs, where it is asked for or pays, and gives the same ids."""
    pays = size >= _TIKTOKEN_PAYS * tokenizer.vocab_size and not settings.whole_text
    if settings.library == "tokenizers" or (settings.library == "auto" and not pays):
        return None
    try:
        if settings.whole_text:
            raise UnfitError("conversations are tokenized whole")
        ranks = prove_tiktoken(tokenizer, rows)
    except UnfitError as error:
        if settings.library == "tiktoken":
            hint = "Leave tokenizer.library at auto."
            raise StepFailed(
                f"tiktoken does not fit this tokenizer: {error}", hint=hint, name="tiktoken_unfit"
            ) from error
        progress.log(f"tokenizing with tokenizers; tiktoken does not fit this tokenizer: {error}")
        return None
    progress.log("tokenizing with tiktoken, which was found to give the same ids")
    return ranks


def _rendered(encoder: Encoder, conversation: Conversation) -> Row | None:
    try:
        return encoder.render(conversation)
    except DroppedError:
        return None


def segments_fit(tokenizer: Tokenizer, rows: Sequence[Row]) -> bool:
    """Whether tokenizing `rows` in segments gives the whole text's tokens, but for those next to a cut."""
    segments = tokenizer.segments
    for row in rows:
        if row.literals or CUT in row.text:
            continue
        whole = segments.backend.encode(row.text, add_special_tokens=False)
        starts, ends = zip(*whole.offsets, strict=True) if whole.offsets else ((), ())
        pieces = [piece.text for piece in row.pieces()]
        encoded = segments.encode_apart(pieces)
        if not same_ids(encoded, segments.encode([pieces])):
            return False
        position = 0
        for text, part in zip(pieces, np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]), strict=True):
            inside = slice(bisect_left(starts, position), bisect_right(ends, position + len(text)))
            if not _same_but_edges(part.tolist(), whole.ids[inside]):
                return False
            position += len(text)
        if tokenizer.decode(encoded.ids.tolist()) != tokenizer.decode(whole.ids):
            return False
    return True


def _same_but_edges(left: Sequence[int], right: Sequence[int]) -> bool:
    core = list(left[_NEAR_CUT : len(left) - _NEAR_CUT])
    if not core:
        return abs(len(left) - len(right)) <= 2 * _NEAR_CUT
    return any(
        list(right[at : at + len(core)]) == core for at in range(2 * _NEAR_CUT + 1) if at + len(core) <= len(right)
    )


def prove_tiktoken(tokenizer: Tokenizer, rows: Sequence[Row]) -> Ranks:
    """What tiktoken needs to give the tokenizer's ids, tried on `rows` and on nasty texts. Raises UnfitError."""
    ranks, plain = rebuild(tokenizer), tokenizer.segments
    tiktoken = TiktokenSegments(ranks, plain)
    for pieces in ([piece.text for row in rows for piece in row.pieces()], NASTY):
        if not same_ids(tiktoken.encode([pieces]), plain.encode([pieces])):
            raise UnfitError("it gives other ids on the first rows or on the texts it is tried on")
    return ranks
