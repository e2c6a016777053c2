"""torch's own files, written and read without torch: torch reads what we write, we read what torch writes."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from steps.artifacts import record
from steps.engine.checkpoint import behind, dcp, pickles, torch_file
from steps.engine.checkpoint.behind import HashedFile, Worker
from steps.engine.checkpoint.lazy import BITS, as_array, as_tensor, dtype_name, empty, lazy, runs
from steps.engine.checkpoint.torch_file import Stored

DTYPES = [getattr(torch, name) for name in BITS]


def values(shape, dtype):
    torch.manual_seed(0)
    return (torch.randn(shape) * 9).to(dtype)


def stored(tensor):
    return Stored(as_array(tensor), tuple(tensor.shape), dtype_name(tensor.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (5, 3, 2)], ids=str)
def test_torch_loads_what_is_written(shape, dtype, tmp_path):
    tensor = values(shape, dtype)
    torch_file.save({"a": stored(tensor), "step": 7, "big": 1 << 40, "rate": 0.5, "none": None}, tmp_path / "x.pt")
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    assert read["a"].dtype == dtype
    assert torch.equal(read.pop("a"), tensor)
    assert read == {"step": 7, "big": 1 << 40, "rate": 0.5, "none": None}
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None, "the checksums are right"


def test_values_are_aligned_as_torch_aligns_them_so_that_they_can_be_mapped(tmp_path):
    torch_file.save(
        {"a": stored(values((3,), torch.int8)), "b": stored(values((5,), torch.float32))}, tmp_path / "x.pt"
    )
    mapped = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(mapped["b"], values((5,), torch.float32))
    assert mapped["b"].data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_writes_is_found(dtype, tmp_path):
    whole = values((6, 4), dtype)
    path = tmp_path / "x"
    for tensor in (whole, whole[2:4], values((), dtype)):
        data = io.BytesIO()
        torch.save(tensor, data)
        path.write_bytes(b"before" + data.getvalue() + b"behind")
        with path.open("rb") as file:
            found = torch_file.locate(file, 6, len(data.getvalue()))
            assert (found.shape, found.dtype) == (tuple(tensor.shape), dtype_name(dtype))
            place = np.empty(found.shape, BITS[found.dtype])
            dcp.read_into(file.fileno(), place, found.offset)
        assert torch.equal(as_tensor(place, found.shape, found.dtype), tensor)


def test_another_layout_is_left_to_torch(tmp_path):
    """A transposed tensor is stored as it lies in memory."""
    tensor = values((4, 6), torch.float32)
    data = io.BytesIO()
    torch.save(tensor.T, data)
    (tmp_path / "__0_0.distcp").write_bytes(data.getvalue())
    with (tmp_path / "__0_0.distcp").open("rb") as file:
        assert torch_file.locate(file, 0, len(data.getvalue())) is None
    chunk = dcp.Chunk("k", (6, 4), (0, 0), (6, 4), lazy(tensor.T))
    place = dcp._Place("__0_0.distcp", 0, len(data.getvalue()))
    (tmp_path / ".metadata").write_bytes(pickles.dumps(dcp._metadata([chunk], [place])))
    read = np.empty((2, 4), np.float32)
    dcp.Reader(tmp_path).read("k", (3, 0), read)
    assert np.array_equal(read, tensor.T[3:5].numpy())


def test_the_metadata_are_those_of_torchs_own_planner(tmp_path):
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    tensor, items, chunks = torch.ones(1, 3).bfloat16(), [], []
    for layer in range(4):
        chunks.append(dcp.Chunk("stack", (4, 3), (layer, 0), (1, 3), lazy(tensor)))
        box = ChunkStorageMetadata(torch.Size((layer, 0)), torch.Size((1, 3)))
        data = TensorWriteData(box, TensorProperties(dtype=torch.bfloat16), torch.Size((4, 3)))
        items.append(WriteItem(MetadataIndex("stack", box.offsets), WriteItemType.SHARD, tensor_data=data))
    (plan,), theirs = create_default_global_save_plan([SavePlan(items)])
    dcp.save(tmp_path, chunks, lambda tensor: None)
    ours = FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert isinstance(ours.state_dict_metadata["stack"], TensorStorageMetadata)
    assert list(ours.storage_data) == [item.index for item in plan.items]
    assert [index.index for index in ours.storage_data] == [item.index.index for item in plan.items]
    sizes = sum(where.length for where in ours.storage_data.values())
    assert sizes == (tmp_path / "__0_0.distcp").stat().st_size


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_reading_a_pickle_runs_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = pickles.loads(pickle.dumps({"a": Evil(), "b": 1}), {})
    assert read["b"] == 1
    assert isinstance(read["a"], pickles.StandIn)
    assert not (tmp_path / "evil").exists()


def test_a_buffer_is_used_again_only_when_nothing_refers_to_it():
    def address(array):
        return array.__array_interface__["data"][0]

    size = (1 << 20,)
    first = empty(size, "float32")
    at = address(first)
    assert address(empty(size, "float32")) != at
    part = first[10:20]
    del first
    assert address(empty(size, "float32")) != at, "a view is left"
    tensor = torch.from_numpy(part)
    del part
    assert address(empty(size, "float32")) != at, "a tensor is left"
    bytes_ = next(runs(tensor.numpy()))
    del tensor
    assert address(empty(size, "float32")) != at, "its bytes are left"
    del bytes_
    assert address(empty(size, "float32")) == at


def test_runs_are_the_bytes_in_order():
    whole = np.arange(2 * 5 * 3, dtype="<i4").reshape(2, 5, 3)
    for view in (whole, whole[:, 1:3], whole[:, :, 1:2], whole[:0], whole[0, 0, 0]):
        assert b"".join(runs(np.asarray(view))) == view.tobytes()


def test_a_hashed_file_need_not_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "SYNC_BYTES", 10)
    (tmp_path / "a").mkdir()
    with HashedFile(tmp_path / "a" / "x") as file:
        file.write([b"one", memoryview(b"two")])
        file.write([b"three" * 10])
        assert file.tell() == 56
    data = b"onetwo" + b"three" * 10
    assert (tmp_path / "a" / "x").read_bytes() == data
    (tmp_path / "a").rename(tmp_path / "b")
    path = tmp_path / "b" / "x"
    assert record._identity(path) in record._remembered
    assert record.digest_file(path) == hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(b"two", b"TWO"))
    assert record.digest_file(path) == hashlib.sha256(path.read_bytes()).hexdigest(), "changed, though not in size"


def test_what_fails_behind_is_raised():
    worker = Worker()
    worker.submit(1, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        worker.close()


@pytest.mark.parametrize("step", ["convert.hf_to_megatron", "convert.megatron_to_hf"])
def test_a_conversion_imports_no_torch(step):
    code = f"import sys, steps.{step}.step; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_checkpoints_do_not_import_torch_distributed_checkpoint():
    code = "import sys, steps.convert.merge_lora.step as s; print('torch.distributed.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
