"""One chunk of raw rows turned into tokens, masks and an account of every row. Runs in the worker processes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steps.engine.data.chat import DroppedError, parse
from steps.engine.data.encoding import Encoder, Row
from steps.engine.data.reading import Chunk
from steps.engine.data.spool import ChunkResult, Spool
from steps.engine.data.tiktoken_ranks import Ranks
from steps.engine.data.tokenizer import Tokenizer
from steps.errors import StepFailed

#: Line numbers that the report shows for each reason.
FIRST_LINES = 5
#: Conversations given to the tokenizer in one call: enough to keep its threads busy, few enough to stay small.
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Settings:
    """What decides the tokens of a row.

    ratios: shares of train, valid and test, 1 together.
    overlong: "drop" | "truncate" | "error" for what is longer than pack_size tokens.
    pad_multiple: documents are padded until the tokens a reader feeds the model, all but the last one, divide by this.
    library: "tokenizers" | "tiktoken" | "auto" (tiktoken where it pays and is proven to give the same ids).
    """

    pack_size: int
    messages_field: str = "messages"
    tools_field: str = "tools"
    loss: str = "assistant"
    overlong: str = "drop"
    pad_multiple: int = 1
    ratios: tuple[float, float, float] = (1.0, 0.0, 0.0)
    seed: int = 0
    whole_text: bool = False
    stream: bool = True
    library: str = "auto"


@dataclass(frozen=True)
class _Kept:
    line: int
    row: Row
    split: int
    copies: int


class ChunkTokenizer:
    """Turns chunks into results. `weights` and `names` of the input files, by number; ranks: see Encoder."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        weights: Sequence[float],
        names: Sequence[str],
        ranks: Ranks | None = None,
    ) -> None:
        self._settings, self._weights, self._names = settings, weights, names
        self._encoder = Encoder(
            tokenizer, settings.loss, whole_text=settings.whole_text, stream=settings.stream, ranks=ranks
        )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = 0 if pad is None else pad

    def __call__(self, chunk: Chunk) -> ChunkResult:
        """The account of a chunk. Raises StepFailed (`overlong_conversation`) where overlong is "error"."""
        result = ChunkResult(rows=len(chunk.rows), file=chunk.file)
        notes: Counter[str] = Counter({"blank_lines": chunk.blank_lines} if chunk.blank_lines else {})
        kept = list(self._render(chunk, result))
        self._spot_check(kept, chunk)
        tokens, lengths, trained, stay = [], [], [], []
        for at in range(0, len(kept), _BATCH_ROWS):
            batch = kept[at : at + _BATCH_ROWS]
            for entry, (ids, mask) in zip(batch, self._encode(batch, chunk, result), strict=True):
                if ids is None or mask is None:
                    continue
                packed, count = self._finish(ids, mask, entry, chunk, result, notes)
                if packed is None:
                    continue
                tokens.append(packed)
                lengths.append(len(packed))
                trained.append(count)
                stay.append(entry)
                notes.update(entry.row.notes)
        result.tokens = np.concatenate(tokens) if tokens else np.zeros(0, np.uint32)
        result.lengths, result.trained = np.asarray(lengths, np.int32), np.asarray(trained, np.int32)
        result.splits = np.asarray([entry.split for entry in stay], np.uint8)
        result.copies = np.asarray([entry.copies for entry in stay], np.int32)
        result.notes = dict(sorted(notes.items()))
        result.dropped = dict(sorted(result.dropped.items()))
        return result

    def _render(self, chunk: Chunk, result: ChunkResult) -> list[_Kept]:
        kept = []
        for line, data in chunk.rows:
            try:
                conversation = parse(data, self._settings.messages_field, self._settings.tools_field)
                text = conversation.canonical.encode()
                copies = _copies(self._weights[chunk.file], _share(text, self._settings.seed, b"sample"))
                if copies == 0:
                    result.not_sampled += 1
                    continue
                row = self._encoder.render(conversation)
            except DroppedError as error:
                _drop(result, error.reason, line)
                continue
            split = _split(self._settings.ratios, _share(text, self._settings.seed, b"split"))
            kept.append(_Kept(line, row, split, copies))
        return kept

    def _spot_check(self, kept: Sequence[_Kept], chunk: Chunk) -> None:
        """Hold one row of every chunk against the tokenizer's own library. Raises StepFailed (`tiktoken_differs`)."""
        if not kept:
            return
        entry = kept[chunk.index % len(kept)]
        if not self._encoder.agrees(entry.row):
            what = f"{self._names[chunk.file]}:{entry.line}: tiktoken gives other ids than tokenizers"
            hint = "Set tokenizer.library=tokenizers, and tell us: this must not happen."
            raise StepFailed(what, hint=hint, name="tiktoken_differs")

    def _encode(
        self, batch: Sequence[_Kept], chunk: Chunk, result: ChunkResult
    ) -> list[tuple[np.ndarray, np.ndarray] | tuple[None, None]]:
        try:
            return list(self._encoder.encode([entry.row for entry in batch]))
        except DroppedError:  # one of them; find out which
            encoded: list[tuple[np.ndarray, np.ndarray] | tuple[None, None]] = []
            for entry in batch:
                try:
                    encoded += self._encoder.encode([entry.row])
                except DroppedError as error:
                    _drop(result, error.reason, entry.line)
                    encoded.append((None, None))
            return encoded

    def _finish(
        self, ids: np.ndarray, trained: np.ndarray, entry: _Kept, chunk: Chunk, result: ChunkResult, notes: Counter[str]
    ) -> tuple[np.ndarray | None, int]:
        """The document as it is stored, and its trained tokens; None when it is dropped."""
        settings = self._settings
        limit = longest_document(settings.pack_size, settings.pad_multiple)
        overlong = len(ids) > limit
        if overlong and settings.overlong == "error":
            where = f"{self._names[chunk.file]}:{entry.line}"
            what = f"{where}: the conversation has {len(ids):,} tokens, pack_size takes {limit:,}"
            raise StepFailed(what, name="overlong_conversation")
        if overlong and settings.overlong == "drop":
            _drop(result, "overlong", entry.line)
            return None, 0
        ids, trained = ids[:limit], trained[:limit]
        mask = shifted(trained)
        count = int(mask.sum())
        if count == 0:
            _drop(result, "truncated_away" if overlong else "nothing_trained", entry.line)
            return None, 0
        if overlong:
            notes["truncated"] += 1
        padding = padded_length(len(ids), settings.pad_multiple) - len(ids)
        result.padding += padding * entry.copies
        packed = ids.astype(np.uint32) << 1 | mask
        return np.concatenate([packed, np.full(padding, self._pad << 1, np.uint32)]) if padding else packed, count


class Done(NamedTuple):
    """A chunk that is in the spool. consumed: see Chunk."""

    consumed: int
    rows: int
    tokens: int


class ChunkWorker:
    """A ChunkTokenizer that leaves its results in a spool: what a worker process runs."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        weights: Sequence[float],
        names: Sequence[str],
        ranks: Ranks | None,
        spool: Path,
    ) -> None:
        self._tokenize = ChunkTokenizer(tokenizer, settings, weights, names, ranks)
        self._spool = Spool(spool)

    def __call__(self, chunk: Chunk) -> Done:
        result = self._tokenize(chunk)
        self._spool.write(chunk.index, result)
        return Done(chunk.consumed, result.rows, len(result.tokens))


def shifted(trained: np.ndarray) -> np.ndarray:
    """loss_mask as it is stored: 1 at j where token j + 1 is trained, 0 at the last position. uint8 [tokens]."""
    mask = np.zeros(len(trained), np.uint8)
    mask[:-1] = trained[1:]
    return mask


def padded_length(length: int, multiple: int) -> int:
    """The stored length of a document: readers feed the model all tokens but the last, and those must divide."""
    return length if multiple == 1 else -(-(length - 1) // multiple) * multiple + 1


def longest_document(pack_size: int, multiple: int) -> int:
    """How many tokens a document may have so that it fits a row after padding."""
    return pack_size if multiple == 1 else (pack_size - 1) // multiple * multiple + 1


def _share(text: bytes, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the conversation and the seed alone."""
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little"), person=purpose).digest()
    return int.from_bytes(digest, "little") / 2**64


def _copies(weight: float, share: float) -> int:
    return int(weight) + (share < weight - int(weight))


def _split(ratios: Sequence[float], share: float) -> int:
    """Which split a share of [0, 1) falls into; one that got no ratio never gets a row."""
    end = 0.0
    for index, ratio in enumerate(ratios):
        end += ratio
        if share < end and ratio > 0:
            return index
    return max(index for index, ratio in enumerate(ratios) if ratio > 0)


def _drop(result: ChunkResult, reason: str, line: int) -> None:
    entry = result.dropped.setdefault(reason, [0, []])
    entry[0] += 1
    if len(entry[1]) < FIRST_LINES:
        entry[1].append(line)
