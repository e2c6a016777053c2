"""torch_dist checkpoints: layers stacked on disk, any chunking read, an iteration whole or absent."""

from __future__ import annotations

import json
import math
from weakref import ref

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint import FileSystemReader

from steps.engine.checkpoint import dcp, megatron
from steps.engine.checkpoint.behind import WAITING_BYTES
from steps.engine.checkpoint.lazy import computed, lazy
from steps.engine.checkpoint.megatron import Checkpoint
from steps.errors import ArtifactError

QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
QKV_KEY = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def model(layers=(0, 1, 2), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(11, 4).to(dtype)}
    tensors |= {QKV.format(layer): torch.randn(6, 4).to(dtype) for layer in layers}
    return tensors


def write(directory, tensors, **options):
    return megatron.write(directory, tensors, **{"num_layers": 3, "run_config": {"model": {}}, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_bit_by_bit(tmp_path, dtype):
    tensors = model(dtype=dtype)
    write(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == list(tensors), "embedding first, then the layers in order"
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


def test_layers_are_stacked_under_one_key_for_every_reader_of_torch_dist(tmp_path):
    """Read back by torch's own loader, which knows nothing of us."""
    tensors = model()
    folder = write(tmp_path, tensors)
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert {key: tuple(entry.size) for key, entry in metadata.items()} == {EMBEDDING: (11, 4), QKV_KEY: (3, 6, 4)}
    target = {EMBEDDING: torch.empty(11, 4), QKV_KEY: torch.empty(3, 6, 4)}
    stock.load(target, storage_reader=FileSystemReader(folder), no_dist=True)
    assert torch.equal(target[EMBEDDING], tensors[EMBEDDING])
    assert torch.equal(target[QKV_KEY], torch.stack([tensors[QKV.format(layer)] for layer in range(3)]))


def test_every_file_that_megatron_looks_for_is_there(tmp_path):
    folder = write(tmp_path, model(), iteration=12, consumed_samples=96)
    assert folder.name == "iter_0000012"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "12"
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    assert torch.load(folder / "common.pt", weights_only=True)["iteration"] == 12
    state = torch.load(tmp_path / "latest_train_state.pt", weights_only=True)
    assert (state["step"].item(), state["consumed_train_samples"].item()) == (12, 96)


def test_an_adapter_on_some_layers_keeps_the_global_shape(tmp_path):
    tensors = {name: tensor for name, tensor in model(layers=(0, 2)).items() if name != EMBEDDING}
    write(tmp_path, tensors, num_layers=5)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shape(QKV_KEY) == (5, 6, 4)
    assert checkpoint.layers(QKV_KEY) == [0, 2]
    assert set(checkpoint.tensors) == set(tensors)
    with pytest.raises(ArtifactError, match=r"has no decoder\.layers\.1"):
        checkpoint.read(QKV.format(1))


def test_a_view_is_written_without_the_storage_behind_it(tmp_path):
    big = torch.randn(1000, 1000)
    folder = write(tmp_path, {QKV.format(0): big[3:5, 7:9]}, num_layers=1)
    assert torch.equal(Checkpoint.open(tmp_path).read(QKV.format(0)), big[3:5, 7:9])
    assert sum(file.stat().st_size for file in folder.glob("*.distcp")) < 10_000


def test_large_checkpoints_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp, "FILE_BYTES", 1000)
    tensors = model()
    folder = write(tmp_path, tensors)
    assert len(list(folder.glob("__0_*.distcp"))) > 1
    assert all(torch.equal(Checkpoint.open(tmp_path).read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("chunking", ["whole stack", "tensor parallel", "pipeline stages"])
def test_other_writers_chunkings_give_the_same_layers(tmp_path, chunking):
    stack = torch.randn(4, 6, 4)
    if chunking == "whole stack":
        stock.save({QKV_KEY: stack}, storage_writer=stock.FileSystemWriter(tmp_path), no_dist=True)
    else:
        boxes = {
            "tensor parallel": [((layer, 3 * rank, 0), (1, 3, 4)) for layer in range(4) for rank in range(2)],
            "pipeline stages": [((0, 0, 0), (1, 6, 4)), ((1, 0, 0), (3, 6, 4))],
        }[chunking]
        chunks = []
        for offsets, sizes in boxes:
            slices = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            part = stack[slices].clone()
            chunks.append(dcp.Chunk(QKV_KEY, (4, 6, 4), offsets, sizes, lazy(part)))
        dcp.save(tmp_path, chunks, lambda tensor: None)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layers(QKV_KEY) == [0, 1, 2, 3]
    for layer in range(4):
        assert torch.equal(checkpoint.read(QKV.format(layer)), stack[layer])


def test_optimizer_state_and_extra_state_of_other_writers_are_no_parameters(tmp_path):
    state = {
        EMBEDDING: torch.randn(3, 2),
        "optimizer.state.exp_avg.embedding.word_embeddings.weight": torch.randn(3, 2),
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2": torch.zeros(1),
        "rng_state": "bytes",
    }
    stock.save(state, storage_writer=stock.FileSystemWriter(tmp_path), no_dist=True)
    assert list(Checkpoint.open(tmp_path).tensors) == [EMBEDDING]


def test_earlier_iterations_stay_and_one_can_be_chosen(tmp_path):
    first, second = model(seed=1), model(seed=2)
    write(tmp_path, first, iteration=10)
    write(tmp_path, second, iteration=20)
    assert megatron.iterations(tmp_path) == [10, 20]
    assert Checkpoint.open(tmp_path).iteration == 20
    assert torch.equal(Checkpoint.open(tmp_path, 10).read(EMBEDDING), first[EMBEDDING])
    assert Checkpoint.open(tmp_path / "iter_0000010").iteration == 10
    with pytest.raises(ArtifactError, match=r"no iteration 15.*10, 20"):
        Checkpoint.open(tmp_path, 15)


def test_a_write_that_fails_leaves_the_last_whole_iteration_in_charge(tmp_path):
    def fail():
        raise OSError("the disk is full")

    tensors = model()
    write(tmp_path, tensors, iteration=1)
    broken = {**tensors, QKV.format(1): computed((6, 4), "float32", fail)}
    with pytest.raises(OSError, match="disk is full"):
        write(tmp_path, broken, iteration=2)
    assert megatron.iterations(tmp_path) == [1]
    assert Checkpoint.open(tmp_path).iteration == 1
    write(tmp_path, model(seed=5), iteration=2)
    assert torch.equal(Checkpoint.open(tmp_path).read(EMBEDDING), model(seed=5)[EMBEDDING])


def test_an_iteration_saved_a_second_time_replaces_the_first(tmp_path):
    write(tmp_path, model(seed=1), iteration=3)
    write(tmp_path, model(seed=2), iteration=3)
    assert torch.equal(Checkpoint.open(tmp_path).read(EMBEDDING), model(seed=2)[EMBEDDING])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]


def test_training_state_comes_back_and_its_absence_is_told(tmp_path):
    state = {"optimizer": {"exp_avg": [torch.randn(3)], "step": 7}, "rng": torch.get_rng_state(), "note": None}
    write(tmp_path, model(), training_state=state)
    read = Checkpoint.open(tmp_path).training_state()
    assert torch.equal(read["optimizer"]["exp_avg"][0], state["optimizer"]["exp_avg"][0])
    assert torch.equal(read["rng"], state["rng"])
    write(tmp_path, model(), iteration=1)
    with pytest.raises(ArtifactError, match="training cannot be resumed"):
        Checkpoint.open(tmp_path).training_state()


# Half a YAML file may well be valid YAML.
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(
            (name, kind)
            for name in (".metadata", "__0_0.distcp", "training_state.pt")
            for kind in ("truncated", "garbage")
        ),
        ("run_config.yaml", "garbage"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, file, damage):
    folder = write(tmp_path, model(), training_state={"step": 1}, run_config={"model": {"num_layers": 3}})
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\x00\x01:\n\t- garbage" * 3)
    with pytest.raises(ArtifactError) as caught:
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.run_config == {"model": {"num_layers": 3}}
        checkpoint.training_state()
        for tensor in checkpoint.tensors.values():
            tensor.load()
    assert "damaged" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.name == "damaged_artifact"


def test_two_tensors_are_held_at_a_time(tmp_path):
    """The one that is written, and the one before it while it is hashed: each is large enough to wait alone."""
    alive = []

    def loader(seed):
        def load():
            held = sum(reference() is not None for reference in alive)
            assert held <= 1, f"{held} earlier tensors are still held"
            tensor = torch.full((WAITING_BYTES // 4 + 1,), float(seed))
            alive.append(ref(tensor))
            return tensor

        return load

    shape = (WAITING_BYTES // 4 + 1,)
    tensors = {QKV.format(layer): computed(shape, "float32", loader(layer)) for layer in range(5)}
    write(tmp_path, tensors, num_layers=5)
    assert len(alive) == 5


def test_sizes_of_lazy_tensors():
    tensor = computed((3, 5), "bfloat16", lambda: torch.zeros(3, 5, dtype=torch.bfloat16))
    assert (tensor.numel, tensor.nbytes) == (15, 30)
    assert tensor.to("float32").nbytes == math.prod((3, 5, 4))
    assert tensor.to("float32").load().dtype == torch.float32
    assert tensor.to("bfloat16") is tensor
