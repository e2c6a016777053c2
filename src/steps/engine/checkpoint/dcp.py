"""torch.distributed.checkpoint, one tensor at a time and without a process group.

The stock writer keeps tensors in memory until its file is full; this one plans from shapes alone, loads each tensor
when its turn comes and lets it go. What lands on disk is torch's own format.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from steps.engine.checkpoint.lazy import LazyTensor
from steps.errors import ArtifactError

#: A data file is closed, and the next one begun, once it is larger than this.
FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Chunk:
    """A box of the global tensor `key`: it begins at `offsets` and has the shape `sizes`."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: LazyTensor


def save(folder: Path, chunks: Sequence[Chunk], written: Callable[[LazyTensor], None]) -> None:
    """Write `__0_*.distcp`, then `.metadata`, into `folder`; `written` is called after each chunk.

    A key's chunks need not cover its global shape: an adapter on some layers leaves the others out. That is why torch's
    own planner, which refuses such a key, is not used.
    """
    (plan,), metadata = create_default_global_save_plan([SavePlan([_write_item(chunk) for chunk in chunks])])
    waiting = deque(zip(plan.items, chunks, strict=True))
    results: list[WriteResult] = []
    number = 0
    while waiting:
        name = f"__0_{number}.distcp"
        with (folder / name).open("wb") as stream:
            while waiting and stream.tell() < FILE_BYTES:
                item, chunk = waiting.popleft()
                offset = stream.tell()
                torch.save(_load(chunk), stream)
                length = stream.tell() - offset
                results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
                written(chunk.tensor)
            stream.flush()
            os.fsync(stream.fileno())
        number += 1
    FileSystemWriter(folder).finish(metadata, [results])


def _write_item(chunk: Chunk) -> WriteItem:
    offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=chunk.tensor.dtype), torch.Size(chunk.global_shape)
    )
    return WriteItem(MetadataIndex(chunk.key, offsets), WriteItemType.SHARD, tensor_data=data)


def _load(chunk: Chunk) -> Tensor:
    tensor = chunk.tensor.load()
    assert (tuple(tensor.shape), tensor.dtype) == (chunk.tensor.shape, chunk.tensor.dtype), chunk
    # A view would drag its whole storage into the file.
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(chunk.sizes)


class Reader:
    """One torch_dist folder, read box by box from whatever chunks cover the box (whole stacks, TP shards, …)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, TypeError, ValueError) as error:
            raise damaged(folder / ".metadata", error) from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def covers(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether the stored chunks hold every element of the box."""
        return sum(math.prod(item.lengths) for item in self._plan(key, offsets, sizes)) == math.prod(sizes)

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box as a new CPU tensor of shape `sizes`.

        Raises ArtifactError when a part of it is not in the checkpoint, or its file is damaged.
        """
        items = self._plan(key, offsets, sizes)
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise ArtifactError(f"{self._folder} does not hold all of {key} at {tuple(offsets)}")
        target = torch.empty(tuple(sizes), dtype=self.tensors[key].properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise damaged(self._folder, error, key) from error
        return target

    def _plan(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[ReadItem]:
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        return create_read_items_for_chunk_list(key, self.tensors[key], [box])


class _Into(LoadPlanner):
    """Copies what is read into one tensor. Of a planner's duties only these two are asked for by `read_data`."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan is made by Reader.read, and it holds only tensors")

    set_up_planner = create_local_plan = create_global_plan = finish_plan = _unused

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self._unused()


def damaged(path: Path, error: BaseException, key: str = "") -> ArtifactError:
    """The error for a file that is there and cannot be read."""
    # PyTorch goes on for a paragraph about what may have happened.
    detail = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    what = f"{path} is damaged: {f'{key}: ' if key else ''}{detail}"
    return ArtifactError(what, hint="Make the checkpoint again.", name="damaged_artifact")
