"""torch.distributed.checkpoint's files, one tensor at a time, without a process group and without importing it.

The stock writer keeps tensors in memory until its file is full; this one plans from shapes alone, reads each tensor
when its turn comes and lets it go. What lands on disk is torch's own format, version 1.0.0 of its metadata
(torch/distributed/checkpoint/metadata.py and filesystem.py): `.metadata` is a pickle that says which chunks a tensor
has and in which file, at which offset, each of them is, as `torch.save` writes it.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steps.engine.checkpoint import pickles, torch_file
from steps.engine.checkpoint.behind import HashedFile
from steps.engine.checkpoint.lazy import BITS, Array, LazyTensor, as_array, runs
from steps.engine.checkpoint.pickles import Name, Object, StandIn
from steps.errors import ArtifactError

#: A data file is closed, and the next one begun, once it is larger than this.
FILE_BYTES = 4 << 30
METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _PROPERTIES, _CHUNK, _INDEX = (
    Name(_MODULE, name)
    for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex")
)
_STORAGE_INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Name("torch", "Size")
_DTYPES = {dtype: Name("torch", dtype) for dtype in BITS}
_STRIDED = Name("torch.serialization", "_get_layout")("torch.strided")
_CONTIGUOUS = Name(_MODULE, "_MEM_FORMAT_ENCODING")(0)
# What a damaged file makes the readers of pickles and zip archives raise.
_DAMAGE = (
    OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, AttributeError, ImportError, TypeError,
    ValueError, LookupError, RuntimeError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A box of the global tensor `key`: it begins at `offsets` and has the shape `sizes`."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: LazyTensor


@dataclass(frozen=True)
class _Place:
    """Where a chunk was written."""

    file: str
    offset: int
    length: int


def save(folder: Path, chunks: Sequence[Chunk], written: Callable[[LazyTensor], None]) -> None:
    """Write `__0_*.distcp`, then `.metadata`, into `folder`; `written` is called after each chunk.

    A key's chunks need not cover its global shape: an adapter on some layers leaves the others out.
    """
    places: list[_Place] = []
    while len(places) < len(chunks):
        name = f"__0_{len({place.file for place in places})}.distcp"
        with HashedFile(folder / name) as file:
            while len(places) < len(chunks) and file.tell() < FILE_BYTES:
                chunk, offset = chunks[len(places)], file.tell()
                for parts in torch_file.pieces(
                    torch_file.Stored(chunk.tensor.array(), chunk.sizes, chunk.tensor.dtype)
                ):
                    file.write(parts)
                places.append(_Place(name, offset, file.tell() - offset))
                written(chunk.tensor)
    partial = folder / f"{METADATA}.tmp"
    with partial.open("wb") as stream:
        stream.write(pickles.dumps(_metadata(chunks, places)))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / METADATA)


def _metadata(chunks: Sequence[Chunk], places: Sequence[_Place]) -> Object:
    tensors: dict[str, Object] = {}
    boxes: dict[str, list[Object]] = defaultdict(list)
    storage: dict[Object, Object] = {}
    for chunk, place in zip(chunks, places, strict=True):
        box = {"offsets": _SIZE(chunk.offsets), "sizes": _SIZE(chunk.sizes)}
        index = {"fqn": chunk.key, "index": len(boxes[chunk.key]), "offset": box["offsets"]}
        boxes[chunk.key].append(Object(_CHUNK, state=box, new=True))
        properties = Object(
            _PROPERTIES, state=(_DTYPES[chunk.tensor.dtype], _STRIDED, False, _CONTIGUOUS, False), new=True
        )
        described = {"properties": properties, "size": _SIZE(chunk.global_shape), "chunks": boxes[chunk.key]}
        tensors.setdefault(chunk.key, Object(_TENSOR, state=described, new=True))
        where = {"relative_path": place.file, "offset": place.offset, "length": place.length}
        storage[Object(_INDEX, state=index, new=True)] = Object(_STORAGE_INFO, state=where, new=True)
    state = {
        "state_dict_metadata": tensors, "planner_data": None, "storage_data": storage, "storage_meta": None,
        "version": "1.0.0",
    }  # fmt: skip
    return Object(_METADATA, state=state, new=True)


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor. dtype: torch's name."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[StoredChunk, ...]


class Reader:
    """One torch_dist folder, read box by box from whatever chunks cover the box (whole stacks, TP shards, …)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.tensors = _tensors((folder / METADATA).read_bytes())
        except _DAMAGE as error:
            raise damaged(folder / METADATA, error) from error

    def covers(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether the stored chunks hold every element of the box."""
        found = self._overlaps(key, offsets, sizes)
        return sum(overlap.numel for overlap in found) == int(np.prod(sizes))

    def read(self, key: str, offsets: Sequence[int], place: Array) -> None:
        """Fill `place` with the box of its shape that begins at `offsets`.

        Raises ArtifactError when a part of it is not in the checkpoint, or its file is damaged.
        """
        if not self.covers(key, offsets, place.shape):
            raise ArtifactError(f"{self._folder} does not hold all of {key} at {tuple(offsets)}")
        try:
            for overlap in self._overlaps(key, offsets, place.shape):
                with (self._folder / overlap.chunk.file).open("rb", buffering=0) as file:
                    _read(file, overlap, self.tensors[key].dtype, place)
        except _DAMAGE as error:
            raise damaged(self._folder, error, key) from error

    def _overlaps(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[_Overlap]:
        for chunk in self.tensors[key].chunks:
            edges = list(zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True))
            first = [max(start, other) for start, _, other, _ in edges]
            last = [min(start + size, other + length) for start, size, other, length in edges]
            if all(start < end for start, end in zip(first, last, strict=True)):
                yield _Overlap(
                    chunk,
                    tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offsets, strict=True)),
                    tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offsets, strict=True)),
                )


@dataclass(frozen=True)
class _Overlap:
    """What a chunk and a box have in common: where it is in the chunk, and where in the box."""

    chunk: StoredChunk
    there: tuple[slice, ...]
    here: tuple[slice, ...]

    @property
    def numel(self) -> int:
        return int(np.prod([part.stop - part.start for part in self.here]))


def _read(file: Any, overlap: _Overlap, dtype: str, place: Array) -> None:
    chunk, target = overlap.chunk, place[overlap.here]
    found = torch_file.locate(file, chunk.offset, chunk.length)
    if found is None:
        target[...] = _read_by_torch(file, chunk)[overlap.there]
        return
    if (found.shape, found.dtype) != (chunk.sizes, dtype):
        what = f"{list(found.shape)} of {found.dtype}, not {list(chunk.sizes)} of {dtype}"
        raise ValueError(f"its chunk at {list(chunk.offsets)} is {what}")
    # Whole rows of the chunk are one piece of the file.
    rows = overlap.there[0] if overlap.there else slice(0, 1)
    row = int(np.prod(chunk.sizes[1:])) * BITS[dtype].itemsize
    inner = [part.stop - part.start for part in overlap.there[1:]]
    if inner == list(chunk.sizes[1:]):
        read_into(file.fileno(), target, found.offset + rows.start * row)
    else:
        whole = np.empty((rows.stop - rows.start, *chunk.sizes[1:]), BITS[dtype])
        read_into(file.fileno(), whole, found.offset + rows.start * row)
        wanted = (slice(None), *overlap.there[1:])
        target[...] = whole[wanted]


def _read_by_torch(file: Any, chunk: StoredChunk) -> Array:
    """A chunk that is stored in another way than as its values in a row: a transposed tensor, another dtype."""
    import torch

    file.seek(chunk.offset)
    data = io.BytesIO(file.read(chunk.length))
    tensor = torch.load(data, map_location="cpu", weights_only=True)
    return as_array(tensor.view(chunk.sizes) if tensor.is_contiguous() else tensor)


def read_into(descriptor: int, place: Array, offset: int) -> None:
    """Fill an array, in row-major order, with the bytes of a file from `offset` on. Raises EOFError if it ends."""
    for run in runs(place):
        while run:
            count = os.preadv(descriptor, [run], offset)
            if not count:
                raise EOFError("the file ends too early")
            run, offset = run[count:], offset + count


def _tensors(data: bytes) -> dict[str, StoredTensor]:
    known: dict[tuple[str, str], Any] = {("torch", "Size"): tuple}
    known |= {("torch", dtype): dtype for dtype in BITS}
    state = pickles.loads(data, known).state
    places = {}
    for index, where in state["storage_data"].items():
        places[index.state["fqn"], index.state.get("offset")] = where.state
    found = {}
    for key, entry in state["state_dict_metadata"].items():
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        properties = entry.state["properties"].state
        dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
        if not isinstance(dtype, str):
            dtype = dtype.__name__ if isinstance(dtype, type) and issubclass(dtype, StandIn) else str(dtype)
        chunks = tuple(_stored(key, chunk.state, places) for chunk in entry.state["chunks"])
        found[key] = StoredTensor(tuple(entry.state["size"]), dtype, chunks)
    return found


def _stored(key: str, box: Any, places: Any) -> StoredChunk:
    where = places[key, box["offsets"]]
    if where.get("transform_descriptors"):
        raise ValueError(f"{key} is compressed, which is not supported")
    return StoredChunk(box["offsets"], box["sizes"], where["relative_path"], where["offset"], where["length"])


def damaged(path: Path, error: BaseException, key: str = "") -> ArtifactError:
    """The error for a file that is there and cannot be read."""
    # PyTorch goes on for a paragraph about what may have happened.
    detail = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    what = f"{path} is damaged: {f'{key}: ' if key else ''}{detail}"
    return ArtifactError(what, hint="Make the checkpoint again.", name="damaged_artifact")
