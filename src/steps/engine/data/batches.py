"""Which packs make which micro-batch, and a micro-batch as tensors.

The order is a function of the seed and a position, the number of packs consumed so far. A run that resumes needs to
remember nothing else, and any number of processes walks through the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steps.engine.data.shards import Pack, PackedSplit


@dataclass(frozen=True)
class MicroBatch:
    """Packs laid end to end, without padding.

    input_ids:  [tokens] int64.   cu_seqlens: [documents + 1].
    trained:    [n] int64, ascending: positions whose next token is trained; targets: [n] int64, those next tokens.
    """

    input_ids: Tensor
    cu_seqlens: list[int]
    trained: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device. A GPU copies it while it computes what came before."""

        def moved(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return MicroBatch(moved(self.input_ids), self.cu_seqlens, moved(self.trained), moved(self.targets))


def collate(packs: Sequence[Pack]) -> MicroBatch:
    """Concatenate packs. A mask at the last token of a document is ignored: the next token is another document's."""
    ids = np.concatenate([pack.input_ids for pack in packs]).astype(np.int64)
    ends = np.cumsum([len(pack.input_ids) for pack in packs])
    offsets = [0, *ends[:-1]]
    bounds = np.concatenate([*(pack.starts + offset for pack, offset in zip(packs, offsets, strict=True)), ends[-1:]])
    mask = np.concatenate([pack.loss_mask for pack in packs]).astype(bool)
    mask[bounds[1:] - 1] = False
    trained = np.flatnonzero(mask)
    return MicroBatch(
        torch.from_numpy(ids), bounds.tolist(), torch.from_numpy(trained), torch.from_numpy(ids[trained + 1])
    )


class Order:
    """Position -> row: a permutation of all rows per epoch, epochs following each other without a gap."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self._seed = rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, inside = divmod(position, self.rows)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, _permutation(self.rows, self._seed, epoch)
        return int(self._permutation[inside])


def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # RandomState's stream is frozen by NumPy's policy, a Generator's may change with a release. It takes only 32 bits
    # a word, hence the hash: any seed and epoch are mixed.
    digest = hashlib.sha256(f"{seed}:order:{epoch}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4")).permutation(rows)


def shares(positions: range, micro_batch_size: int, rank: int, processes: int) -> Iterator[range]:
    """The micro-batches of one process out of a global batch: every `processes`-th, beginning with number `rank`.

    Megatron's split. Each micro-batch is the same for any number of processes; only who computes it differs.
    """
    step = micro_batch_size * processes
    for start in range(positions.start + rank * micro_batch_size, positions.stop, step):
        yield range(start, min(start + micro_batch_size, positions.stop))


def read(split: PackedSplit, rows: Sequence[int]) -> MicroBatch:
    """The micro-batch of these rows of a split."""
    return collate([split[row] for row in rows])
