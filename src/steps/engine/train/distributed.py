"""Several processes, each with the whole frozen base, summing their adapter gradients: data parallelism by hand.

The adapters are a percent of the model, so one all-reduce of one flat buffer per optimizer step is all there is to it.
Processes are started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; the same bits everywhere."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give every process what process 0 holds, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def same(self, value: T) -> T:
        """What process 0 holds, on every process: anything that can be pickled."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, 0, device=self.device)
        return held[0]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started (or be the only one)."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        _same_bits()
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _same_bits() -> None:
    """Make CUDA kernels deterministic: a resumed run must come to the same adapter. CPU kernels are so already.

    Not `warn_only`: with it the backward passes of attention stay as they are and only warn.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
