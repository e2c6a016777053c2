from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.packed import random_rows, write_packed

from steps.engine.data import shards
from steps.engine.data.batches import Order, collate, read, shares
from steps.engine.data.shards import PackedSplit
from steps.errors import ArtifactError


@pytest.fixture
def rows():
    return random_rows(23)


@pytest.fixture
def packed(tmp_path, rows):
    return write_packed(tmp_path / "packed", rows, rows[:3])


def test_rows_come_back_in_file_order_also_when_jumping(packed, rows, monkeypatch):
    monkeypatch.setattr(shards, "CACHED_GROUPS", 2)
    split = PackedSplit(packed, "train")
    assert len(split) == 23
    for row in [*range(23), 22, 0, 11, 12, 5]:
        pack = split[row]
        assert pack.input_ids.tolist() == rows[row]["input_ids"]
        assert pack.loss_mask.tolist() == rows[row]["loss_mask"]
        assert pack.starts.tolist() == rows[row]["seq_start_id"]
    assert len(split._cache) == 2


def test_an_absent_split_is_empty(packed):
    assert len(PackedSplit(packed, "test")) == 0


def test_a_micro_batch_is_the_packs_end_to_end(packed, rows):
    split = PackedSplit(packed, "train")
    batch = read(split, [4, 9])
    one, two = rows[4], rows[9]
    assert batch.input_ids.tolist() == one["input_ids"] + two["input_ids"]
    offset = len(one["input_ids"])
    ends = offset + len(two["input_ids"])
    assert batch.cu_seqlens == one["seq_start_id"] + [start + offset for start in two["seq_start_id"]] + [ends]
    mask = one["loss_mask"] + two["loss_mask"]
    assert batch.trained.tolist() == [at for at, trained in enumerate(mask) if trained]
    assert torch.equal(batch.targets, batch.input_ids[batch.trained + 1])


def test_the_last_token_of_a_document_is_never_trained():
    from numpy import array, ones, uint8

    pack = shards.Pack(array([5, 6, 7, 8]), ones(4, dtype=uint8), array([0, 2]))
    batch = collate([pack, pack])
    assert batch.trained.tolist() == [0, 2, 4, 6]
    assert batch.targets.tolist() == [6, 8, 6, 8]


def test_each_epoch_is_a_permutation_and_positions_alone_decide():
    order = Order(10, seed=3)
    epochs = [[order[position] for position in range(10 * epoch, 10 * epoch + 10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Order(10, seed=3)[27] == epochs[2][7]
    assert [Order(10, seed=4)[position] for position in range(10)] != epochs[0]


def test_the_order_is_the_same_with_every_release_of_numpy():
    """From RandomState, whose stream NumPy froze: a run resumes only in the order it began with."""
    first_epoch, second_epoch = [7, 6, 5, 0, 4, 3, 8, 2, 1, 9], [5, 2, 4, 8, 7, 6, 1, 9, 0, 3]
    assert [Order(10, seed=3)[position] for position in range(20)] == first_epoch + second_epoch
    assert sorted(Order(5, seed=2**40)[position] for position in range(5)) == list(range(5))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_same_micro_batches(processes):
    whole = list(shares(range(12, 24), 2, 0, 1))
    parts = [list(shares(range(12, 24), 2, rank, processes)) for rank in range(processes)]
    assert sorted((share for part in parts for share in part), key=lambda share: share.start) == whole
    assert {len(part) for part in parts} == {6 // processes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [1]}, "loss_mask has 1 entries for 4 tokens"),
        ({"seq_start_id": [1, 2]}, "seq_start_id must start at 0"),
        ({"seq_start_id": [0, 2, 2]}, "seq_start_id must start at 0"),
        ({"seq_start_id": [0, 4]}, "seq_start_id must start at 0"),
        ({"input_ids": [], "loss_mask": []}, "holds no token"),
    ],
)
def test_a_row_that_contradicts_itself_is_told_with_its_place(tmp_path, change, message):
    row = {"input_ids": [1, 2, 3, 4], "loss_mask": [1, 1, 1, 0], "seq_start_id": [0]}
    packed = write_packed(tmp_path, [row, {**row, **change}])
    with pytest.raises(ArtifactError, match=message) as caught:
        PackedSplit(packed, "train")[1]
    assert "b.parquet, row group 0, row 0" in str(caught.value)


def test_unreadable_and_foreign_files_are_told(tmp_path):
    folder = tmp_path / "splits" / "train"
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match=r"a\.parquet cannot be read") as caught:
        PackedSplit(tmp_path, "train")
    assert caught.value.name == "damaged_artifact"
    pq.write_table(pa.table({"text": ["x"]}), folder / "a.parquet")
    with pytest.raises(ArtifactError, match="has no column"):
        PackedSplit(tmp_path, "train")
