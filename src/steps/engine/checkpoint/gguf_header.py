"""The header of a GGUF file: its metadata and where its tensors lie.

The `gguf` library's reader makes objects of every token and merge, which takes seconds for a vocabulary; this takes a
tenth of one. Layout: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.errors import ArtifactError

# Metadata value types by their number; 8 is text, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    shape: as torch has it, [rows, columns] (GGUF counts from the other end).   type: a gguf.GGMLQuantizationType.
    offset, nbytes: in the file.   byte_shape: the shape of the stored bytes, blocks of quantized numbers in a row.
    """

    shape: tuple[int, ...]
    type: Any
    offset: int
    nbytes: int
    byte_shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """metadata: by key; numbers, text, booleans and lists of them."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read it. Raises ArtifactError (damaged_artifact): the file is no GGUF, or shorter than its header promises."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Cursor(data).header()
            size = len(data)
        end = max((tensor.offset + tensor.nbytes for tensor in header.tensors.values()), default=0)
        if size < end:
            raise ValueError(f"it has {size} bytes, its header promises {end}")
    except (OSError, ValueError, KeyError, struct.error) as error:
        # Told here and not through `dcp`, which imports torch: a tokenizer alone must not cost that.
        detail = str(error).partition("\n")[0] or type(error).__name__
        raise ArtifactError(f"{path} is damaged: {detail}", hint="Fetch it again.", name="damaged_artifact") from error
    return header


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported (2 and 3 are, little-endian)")
        tensors, entries = self._number("Q"), self._number("Q")
        metadata = {self._text(): self._value(self._number("I")) for _ in range(entries)}
        infos = [self._info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        return Header(metadata, {name: _stored(shape, kind, start + offset) for name, shape, kind, offset in infos})

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        if length > len(self._data) - self._at:
            raise ValueError("it ends within its header")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            return self._number(_SCALARS[kind])
        kind, count = self._number("I"), self._number("Q")
        if count > len(self._data) - self._at:
            raise ValueError("it ends within its header")
        if kind in (_TEXT, _LIST):
            return [self._value(kind) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._data, self._at)
        self._at += struct.calcsize(f"<{count}{_SCALARS[kind]}")
        return list(values)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        sizes = [self._number("Q") for _ in range(self._number("I"))]
        return name, tuple(reversed(sizes)), self._number("I"), self._number("Q")


def _stored(shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    type = GGMLQuantizationType(kind)
    block, nbytes = GGML_QUANT_SIZES[type]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} numbers do not divide into blocks of {block}")
    byte_shape = (*shape[:-1], shape[-1] // block * nbytes)
    total = 1
    for size in byte_shape:
        total *= size
    return StoredTensor(shape, type, offset, total, byte_shape)
