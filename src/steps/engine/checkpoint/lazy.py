"""Tensors that are read when they are asked for, so that a model larger than memory passes through one at a time.

What is only moved (read, hashed, laid out anew, written) stays an array of plain bits and needs no torch, whose import
takes longer than copying a gigabyte. `load` makes a torch tensor of it where something is computed.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Values as they are stored, little-endian. numpy has no bfloat16: its bits are kept as unsigned integers.
Array = np.ndarray[Any, np.dtype[Any]]
#: torch's names of dtypes, and numpy's dtype of the same bits.
BITS: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("<i1"),
    "uint8": np.dtype("<u1"),
    "bool": np.dtype("?"),
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor known by shape and dtype.

    dtype:  torch's name of it, one of BITS.
    source: reads the values, in row-major order, into the array it is given, or into a new one, and returns it. The
            array may have another shape than the tensor, and leading axes that are not dense: q, k and v are parts of
            what is one matrix elsewhere, and are read into and written out of it where they are.
    """

    shape: tuple[int, ...]
    dtype: str
    source: Callable[[Array | None], Array]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.numel * BITS[self.dtype].itemsize

    def array(self) -> Array:
        """Read it. Nothing keeps a reference but, for a moment, a thread that hashes it: it must not be changed."""
        return self.source(None)

    def load(self) -> Tensor:
        """Read it as a torch tensor: on the CPU, contiguous. It must not be changed in place, see `array`."""
        return as_tensor(self.source(None), self.shape, self.dtype)

    def to(self, dtype: str) -> LazyTensor:
        """The same tensor, cast when it is read."""
        if dtype == self.dtype:
            return self

        def load() -> Tensor:
            import torch

            return self.load().to(getattr(torch, dtype))

        return computed(self.shape, dtype, load)


#: Name to tensor, in the order in which it is best read.
LazyTensors = Mapping[str, LazyTensor]


def stored(shape: tuple[int, ...], dtype: str, fill: Callable[[Array], None]) -> LazyTensor:
    """A tensor that `fill` reads into an array."""

    def source(place: Array | None) -> Array:
        if place is None:
            place = empty(shape, dtype)
        fill(place)
        return place

    return LazyTensor(shape, dtype, source)


def derived(shape: tuple[int, ...], dtype: str, make: Callable[[], Array]) -> LazyTensor:
    """A tensor that `make` returns as an array of its own."""

    def source(place: Array | None) -> Array:
        made = make()
        if place is None:
            return made
        place[...] = np.ascontiguousarray(made).reshape(place.shape)
        return place

    return LazyTensor(shape, dtype, source)


def computed(shape: tuple[int, ...], dtype: str, load: Callable[[], Tensor]) -> LazyTensor:
    """A tensor that `load` computes with torch."""

    def make() -> Array:
        tensor = load()
        assert (tuple(tensor.shape), dtype_name(tensor.dtype)) == (shape, dtype)
        return as_array(tensor)

    return derived(shape, dtype, make)


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory already. It is detached and moved to the CPU only when it is read."""
    return computed(tuple(tensor.shape), dtype_name(tensor.dtype), lambda: tensor)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def as_array(tensor: Tensor) -> Array:
    """The same values as an array; not copied when the tensor is contiguous and on the CPU."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    # What numpy has no name for goes by way of integers of the same width.
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return plain.numpy().view(BITS[dtype_name(tensor.dtype)])


def as_tensor(array: Array, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The same values as a torch tensor of that shape; not copied when the array is contiguous."""
    import torch

    bits = np.ascontiguousarray(array).reshape(shape)
    if dtype == "bfloat16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)


_buffers: list[np.ndarray[Any, np.dtype[np.uint8]]] = [np.empty(0, np.uint8)]
#: References to a buffer that nobody uses, asked for in the same way as below. The first one never is used.
_IDLE = sys.getrefcount(_buffers[0])
#: Arrays of fewer bytes are not worth a buffer.
_SMALL = 1 << 20
#: Where no buffer fits, the idle ones are kept for later as long as they and the new one are no more bytes than this.
_SPARE = 128 << 20


def empty(shape: tuple[int, ...], dtype: str) -> Array:
    """A new array, in memory that an earlier one has left where that fits.

    Fresh memory costs more than what is done with it: 1.7 GB read, hashed twice and written in arrays of 46 MB take 3.4
    to 4.3 s of system time, 2.0 to 2.4 s in two that are used in turn (of 1.2 to 1.8 for reading and writing alone).
    """
    nbytes = math.prod(shape) * BITS[dtype].itemsize
    if nbytes < _SMALL:
        return np.empty(shape, BITS[dtype])
    # An array that is still in use refers to its buffer, and so do its views and its tensors.
    idle = [at for at in range(1, len(_buffers)) if sys.getrefcount(_buffers[at]) == _IDLE]
    at = next((at for at in idle if nbytes <= _buffers[at].nbytes <= 2 * nbytes), None)
    if at is None:
        kept = nbytes
        for spare in reversed(idle):
            kept += _buffers[spare].nbytes
            if kept > _SPARE:
                kept -= _buffers[spare].nbytes
                del _buffers[spare]
        at = len(_buffers)
        memory = mmap.mmap(
            -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # not malloc's, which may keep what is let go
        memory.madvise(mmap.MADV_HUGEPAGE)
        _buffers.append(np.frombuffer(memory, np.uint8))
    return _buffers[at][:nbytes].view(BITS[dtype]).reshape(shape)


def like(tensor: Tensor) -> Tensor:
    """`torch.empty_like`, on the CPU in memory that an earlier one has left, see `empty`."""
    import torch

    name = dtype_name(tensor.dtype)
    if tensor.device.type != "cpu" or name not in BITS:
        return torch.empty_like(tensor)
    return as_tensor(empty(tuple(tensor.shape), name), tuple(tensor.shape), name)


def runs(array: Array) -> Iterator[memoryview]:
    """The bytes of an array in row-major order, as few dense runs: one for a contiguous array. Nothing is copied."""
    if array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8).data
    else:
        for part in array:
            yield from runs(part)
