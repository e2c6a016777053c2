"""Packed rows read from Parquet at random, one row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steps.artifacts import packed_parquet
from steps.errors import ArtifactError

COLUMNS = ("input_ids", "loss_mask", "seq_start_id")
#: Row groups (64 rows each, as we write them) kept in memory: about 45 MB at 4,096 tokens a row.
CACHED_GROUPS = 32


@dataclass(frozen=True)
class Pack:
    """One packed row.

    input_ids: [tokens].  loss_mask: [tokens], already shifted: 1 where the *next* token is trained.
    starts:    [documents], where each document begins; starts[0] == 0.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    starts: np.ndarray


class PackedSplit:
    """The rows of one split, by number over all its files in their order. Only row counts are read up front."""

    def __init__(self, path: Path, split: str) -> None:
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for shard in packed_parquet.shards(path, split):
            try:
                metadata = pq.read_metadata(shard)
            except (OSError, pa.ArrowException) as error:
                raise _damaged(shard, error) from error
            if missing := set(COLUMNS) - set(metadata.schema.to_arrow_schema().names):
                raise ArtifactError(f"{shard} has no column {min(missing)}", name="wrong_type")
            for group in range(metadata.num_row_groups):
                self._groups.append((shard, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends = list(accumulate(sizes))
        self._cache: OrderedDict[int, tuple[list[np.ndarray], ...]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Pack:
        """Row `row`. Raises ArtifactError where its file cannot be read or its columns contradict each other."""
        group = bisect_right(self._ends, row)
        columns = self._cache.pop(group, None) or self._read(group)
        self._cache[group] = columns
        if len(self._cache) > CACHED_GROUPS:
            self._cache.popitem(last=False)
        inside = row - (self._ends[group - 1] if group else 0)
        pack = Pack(*(column[inside] for column in columns))
        if fault := _fault(pack):
            raise ArtifactError(f"{self._groups[group][0]}, row group {self._groups[group][1]}, row {inside}: {fault}")
        return pack

    def _read(self, group: int) -> tuple[list[np.ndarray], ...]:
        shard, number = self._groups[group]
        try:
            with pq.ParquetFile(shard) as file:
                table = file.read_row_group(number, columns=list(COLUMNS))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(shard, error) from error
        return tuple(_rows(table.column(name)) for name in COLUMNS)


def _rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    array = column.combine_chunks()
    ends = array.offsets.to_numpy()
    return np.split(array.values.to_numpy(), ends[1:-1])


def _fault(pack: Pack) -> str:
    tokens = len(pack.input_ids)
    if not tokens:
        return "it holds no token"
    if len(pack.loss_mask) != tokens:
        return f"loss_mask has {len(pack.loss_mask)} entries for {tokens} tokens"
    bounds = np.append(pack.starts, tokens)
    if bounds[0] != 0 or np.any(np.diff(bounds) <= 0):
        return "seq_start_id must start at 0 and ascend below the number of tokens"
    return ""


def _damaged(shard: Path, error: BaseException) -> ArtifactError:
    detail = str(error).partition("\n")[0]
    return ArtifactError(f"{shard} cannot be read: {detail}", hint="Pack the data again.", name="damaged_artifact")
