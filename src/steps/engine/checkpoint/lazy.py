"""Tensors that are read when they are asked for, so that a model larger than memory passes through one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor known by shape and dtype; `load` reads it (on CPU, contiguous) and keeps no reference to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that `load` will return."""
        return self.numel * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same tensor, cast when it is loaded."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.load().to(dtype))


#: Name to tensor, in the order in which it is best read.
LazyTensors = Mapping[str, LazyTensor]


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory already. It is detached and moved to the CPU only when it is loaded."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu().contiguous())
