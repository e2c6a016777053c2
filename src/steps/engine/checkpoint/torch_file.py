"""Files as `torch.save` writes them, written and read without torch.

A zip archive without compression: `data.pkl`, a pickle in which a tensor is `torch._utils._rebuild_tensor_v2(storage,
offset, size, stride, …)` with its storage a persistent id, and `data/0`, `data/1`, … with the bytes of the storages,
aligned to 64. (torch/serialization.py; PKWARE's APPNOTE 6.3 for zip and its 64-bit form.)
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from steps.engine.checkpoint import pickles
from steps.engine.checkpoint.lazy import BITS, Array, runs
from steps.engine.checkpoint.pickles import Name

try:
    from isal.isal_zlib import crc32  # a sixth of the other's time: 20 GB/s
except ImportError:  # it has no wheel for this machine
    from zlib import crc32

Parts = Sequence[bytes | memoryview]

#: torch's names of dtypes, and its classes of storages for them.
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
assert _STORAGES.keys() == BITS.keys()
_CLASSES = {dtype: Name("torch", name) for dtype, name in _STORAGES.items()}
_DTYPES = {name: dtype for dtype, name in _STORAGES.items()}
_REBUILD, _ORDERED_DICT = Name("torch._utils", "_rebuild_tensor_v2"), Name("collections", "OrderedDict")
_ALIGNMENT = 64
_PREFIX = "archive/"


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of an object that is written: its array (any strides), its shape, torch's name of its dtype."""

    array: Array
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class _Storage:
    dtype: str
    key: str
    numel: int


def pieces(obj: Any) -> Iterator[Parts]:
    """The bytes of `torch.save(obj)`, in order. obj: plain values with Stored for its tensors."""
    storages: list[Stored] = []
    data = pickles.dumps(_prepared(obj, storages), _persistent_id)
    archive = _Archive()
    yield archive.record("data.pkl", [data])
    yield archive.record(".format_version", [b"1"])
    yield archive.record(".storage_alignment", [str(_ALIGNMENT).encode()])
    yield archive.record("byteorder", [b"little"])
    for key, stored in enumerate(storages):
        yield archive.record(f"data/{key}", list(runs(stored.array)))
    yield archive.record("version", [b"3\n"])
    yield [archive.end()]


def save(obj: Any, path: Path) -> None:
    """`torch.save(obj, path)`."""
    with path.open("wb") as file:
        for parts in pieces(obj):
            file.writelines(parts)


def _prepared(obj: Any, storages: list[Stored]) -> Any:
    if isinstance(obj, Stored):
        strides, step = [], 1
        for size in reversed(obj.shape):
            strides.append(step)
            step *= size
        storage = _Storage(obj.dtype, str(len(storages)), obj.array.size)
        storages.append(obj)
        return _REBUILD(storage, 0, obj.shape, tuple(reversed(strides)), False, _ORDERED_DICT())
    return {key: _prepared(value, storages) for key, value in obj.items()} if isinstance(obj, Mapping) else obj


def _persistent_id(obj: Any) -> Any:
    return ("storage", _CLASSES[obj.dtype], obj.key, "cpu", obj.numel) if isinstance(obj, _Storage) else None


class _Archive:
    """The zip format, records stored as they are. 64-bit sizes throughout: a tensor may be larger than 4 GB."""

    def __init__(self) -> None:
        self._offset = 0
        self._directory: list[bytes] = []

    def record(self, name: str, content: Parts) -> Parts:
        """The next record: its header and its content, which is aligned."""
        path, size, checksum = (_PREFIX + name).encode(), sum(len(part) for part in content), 0
        for part in content:
            checksum = crc32(part, checksum)
        sizes = struct.pack("<HHQQ", 1, 16, size, size)
        # The rest of the extra field is padding, under the mark that torch uses for it.
        before = self._offset + 30 + len(path) + len(sizes) + 4
        padding = b"Z" * (-before % _ALIGNMENT)
        extra = sizes + struct.pack("<2sH", b"FB", len(padding)) + padding
        common = struct.pack("<HHHHHIIIH", 45, 0, 0, 0, 0x21, checksum, 0xFFFFFFFF, 0xFFFFFFFF, len(path))
        header = b"PK\3\4" + common + struct.pack("<H", len(extra)) + path + extra
        located = struct.pack("<HHQQQ", 1, 24, size, size, self._offset)
        self._directory.append(
            b"PK\1\2" + struct.pack("<H", 45) + common
            + struct.pack("<HHHHII", len(located), 0, 0, 0, 0, 0xFFFFFFFF) + path + located
        )  # fmt: skip
        self._offset += len(header) + size
        return [header, *content]

    def end(self) -> bytes:
        """The central directory and what leads to it."""
        directory, count = b"".join(self._directory), len(self._directory)
        end64 = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), self._offset)
        locator = b"PK\6\7" + struct.pack("<IQI", 0, self._offset + len(directory), 1)
        end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        return directory + end64 + locator + end


@dataclass(frozen=True)
class Located:
    """Where in a file the values of a tensor are: dense, in row-major order."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


def locate(file: IO[bytes], offset: int, length: int) -> Located | None:
    """Find the values of the one tensor that `torch.save` wrote into these bytes of a file.

    None for what is not laid out as its values in a row: only torch itself reads that. Raises what zipfile and pickle
    raise for damaged data, ValueError for what is no tensor.
    """
    with zipfile.ZipFile(_Segment(file, offset, length)) as archive:  # type: ignore[arg-type]
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        data = archive.read(records["data.pkl"])
        order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
    rebuilt = pickles.loads(data, {("torch._utils", "_rebuild_tensor_v2"): _Rebuilt})
    if not isinstance(rebuilt, _Rebuilt):
        return None
    _, storage, key, *_ = rebuilt.storage
    dtype = _DTYPES.get(getattr(storage, "__name__", ""))
    if dtype is None or not rebuilt.dense or order != b"little":
        return None
    info = records[f"data/{key}"]
    file.seek(offset + info.header_offset + 26)
    path, extra = struct.unpack("<HH", file.read(4))
    start = offset + info.header_offset + 30 + path + extra + rebuilt.offset * BITS[dtype].itemsize
    if info.compress_type or start + math.prod(rebuilt.shape) * BITS[dtype].itemsize > offset + length:
        return None
    return Located(start, rebuilt.shape, dtype)


class _Rebuilt:
    """What stands for a tensor in the pickle. storage: its persistent id."""

    def __init__(self, storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    @property
    def dense(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


class _Segment:
    """A part of a file, as a file that zipfile reads."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
