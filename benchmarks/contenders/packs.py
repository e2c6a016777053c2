"""The rows of a packed_parquet as other programs want them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from steps.engine.data.batches import Order


class Pack(NamedTuple):
    """One row as documents: token ids of each, and for each token whether it is a trained target."""

    documents: list[list[int]]
    targets: list[list[bool]]


def packs(directory: Path, rows: int, seed: int) -> Iterator[Pack]:
    """Rows of the train split, as many and in the order in which our engine takes them under this seed."""
    table = pq.read_table(sorted((directory / "splits" / "train").glob("*.parquet")))
    order = Order(len(table), seed)
    for row in table.take([int(order[position]) for position in range(rows)]).to_pylist():
        ids, mask = row["input_ids"], row["loss_mask"]
        bounds = [*row["seq_start_id"], len(ids)]
        pairs = list(pairwise(bounds))
        # The mask says at j whether token j + 1 is trained; a target is marked at its own place here.
        yield Pack(
            [ids[start:end] for start, end in pairs],
            [[False, *map(bool, mask[start : end - 1])] for start, end in pairs],
        )
