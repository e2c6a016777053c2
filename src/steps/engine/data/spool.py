"""Tokenized rows on disk between tokenizing and packing; each chunk appears whole or not at all.

Two files a chunk: its tokens, and, written after them, what is known of its rows. A chunk with the second file is done,
so a run that is killed goes on behind its last finished chunks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclass
class ChunkResult:
    """The rows of one chunk that stay, one after the other, and what became of the others.

    tokens:  uint32, `id << 1 | loss_mask` (the mask already shifted): one array to read instead of two.
    lengths: int32 [rows].  splits: uint8 [rows], index into packed_parquet.SPLITS.
    trained: int32 [rows], tokens the loss covers.  copies: int32 [rows], how often the row is used.
    dropped: reason -> [count, first line numbers].  notes: counts by name.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    splits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    copies: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    rows: int = 0
    file: int = 0
    not_sampled: int = 0
    padding: int = 0
    dropped: dict[str, list[Any]] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)


_ARRAYS = ("lengths", "splits", "trained", "copies")
_COUNTS = ("rows", "file", "not_sampled", "padding", "dropped", "notes")


class Spool:
    """Chunks in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Read, not mapped: mapped pages count as this process's memory, and there is more of them than memory.
        self._open = lru_cache(maxsize=256)(lambda index: self._path(index, "u32").open("rb"))

    def __contains__(self, index: int) -> bool:
        return self._path(index, "npz").is_file()

    def write(self, index: int, result: ChunkResult) -> None:
        """Keep a chunk's result."""
        write_whole(self._path(index, "u32"), lambda file: file.write(result.tokens.astype("<u4").tobytes()))
        counts = json.dumps({name: getattr(result, name) for name in _COUNTS})
        arrays = {name: getattr(result, name) for name in _ARRAYS}
        write_whole(self._path(index, "npz"), lambda file: np.savez(file, counts=np.asarray(counts), **arrays))

    def read(self, index: int) -> ChunkResult:
        """A chunk's result; its tokens are an empty array (see `tokens`)."""
        with np.load(self._path(index, "npz")) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            return ChunkResult(**arrays, **json.loads(str(stored["counts"])))

    def tokens(self, index: int, offset: int, length: int) -> np.ndarray:
        """`length` tokens of a chunk from `offset` on."""
        return np.frombuffer(os.pread(self._open(index).fileno(), 4 * length, 4 * offset), "<u4")

    def _path(self, index: int, suffix: str) -> Path:
        return self.directory / f"chunk-{index:07d}.{suffix}"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that appears whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
