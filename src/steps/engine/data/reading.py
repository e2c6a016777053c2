"""Rows of chat data read as a stream: JSON lines, plain or compressed, and Parquet, in chunks of bounded size.

Where chunks begin depends on the files alone, never on how many processes work on them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from steps.engine.data.blend import Source
from steps.errors import StepFailed

CHUNK_ROWS = 512
CHUNK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DataFile:
    """One input file. digest: sha256 of its bytes. weight: see blend.Source."""

    path: Path
    weight: float
    size: int
    digest: str


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked on together.

    rows: (line, JSON bytes), lines counted from 1. file: which DataFile, by number.
    consumed: bytes of the input file (as stored) read since the chunk before.
    """

    index: int
    file: int
    rows: Sequence[tuple[int, bytes]]
    blank_lines: int
    consumed: int


def examine(sources: Sequence[Source]) -> list[DataFile]:
    """The files of `sources` with their digests. Reads every byte, at disk speed."""
    files = []
    for source in sources:
        for path in source.files:
            with path.open("rb") as file:
                digest = (
                    hashlib.file_digest(file, "sha256").hexdigest()
                    if hasattr(hashlib, "file_digest")
                    else _sha256(file)
                )
            files.append(DataFile(path, source.weight, path.stat().st_size, digest))
    return files


def _sha256(file: IO[bytes]) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def chunks(files: Sequence[DataFile], max_rows: int | None, messages_field: str, tools_field: str) -> Iterator[Chunk]:
    """Every row of `files`, in order, at most `max_rows` of them. Raises StepFailed (`unreadable_input`)."""
    index, left = 0, max_rows
    for number, file in enumerate(files):
        consumed = 0
        for rows, blank, position in _grouped(_rows(file.path, (messages_field, tools_field))):
            rows = rows if left is None else rows[:left]
            if rows or blank:
                yield Chunk(index, number, rows, blank, position - consumed)
            index, consumed = index + 1, position
            if left is not None:
                left -= len(rows)
                if left <= 0:
                    return


def _grouped(rows: Iterator[tuple[int, bytes, int]]) -> Iterator[tuple[list[tuple[int, bytes]], int, int]]:
    group: list[tuple[int, bytes]] = []
    size = blank = position = 0
    for line, data, position in rows:
        if data.strip():
            group.append((line, data))
            size += len(data)
        else:
            blank += 1
        if len(group) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield group, blank, position
            group, size, blank = [], 0, 0
    if group or blank:
        yield group, blank, position


def _rows(path: Path, fields: tuple[str, str]) -> Iterator[tuple[int, bytes, int]]:
    """(line, data, bytes of the file read so far) of each line."""
    line = 0
    try:
        if path.name.endswith(".parquet"):
            for line, data, position in _parquet_rows(path, fields):
                yield line, data, position
            return
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            # Bytes, not text: only a line feed ends a row, while text mode also takes \r, and splitlines U+2028.
            for line, data in enumerate(stream, 1):
                yield line, data.removeprefix(_BOM) if line == 1 else data, raw.tell()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        what = f"{path}: cannot be read after row {line}: {error}"
        hint = "The file is damaged or cut short: fetch it again."
        raise StepFailed(what, hint=hint, name="unreadable_input") from error


def _decompressed(path: Path, raw: IO[bytes]) -> Any:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(reader, 1 << 20)
    return raw


def _parquet_rows(path: Path, fields: tuple[str, str]) -> Iterator[tuple[int, bytes, int]]:
    with pq.ParquetFile(path) as file:
        columns = [name for name in fields if name in file.schema_arrow.names]
        total, size, line = file.metadata.num_rows, path.stat().st_size, 0
        # No column of ours: the rows are still there, and each is reported as one without messages.
        batches = file.iter_batches(CHUNK_ROWS, columns=columns) if columns else ()
        for batch in batches:
            for row in batch.to_pylist():
                line += 1
                yield line, json.dumps(_present(row), ensure_ascii=True, default=str).encode(), size * line // total
        for bare in range(line + 1, total + 1):
            yield bare, b"{}", size * bare // total


def _present(value: Any) -> Any:
    """Without the nulls that a Parquet struct holds for every field that some other row has."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
