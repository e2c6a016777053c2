from __future__ import annotations

import pytest
import torch
from support.adapters import adapted, shake, train
from support.packed import SHAPE, random_decoder, random_rows, write_base, write_packed

from steps.config.peft.vblora import VBLoRA
from steps.engine.adapters.vblora import index_dtype
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.checkpoint.merge import open_adapter
from steps.shapes import account
from steps.shapes.targets import chosen, shape

IDS = torch.randint(SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
BOUNDS = [0, 13, 40]
CASE = {"type": "vblora", "dim": 4, "num_vectors": 20, "vector_length": 16}
SMOLLM2 = {"linear_qkv": (960, 576), "linear_proj": (576, 576), "linear_fc1": (3072, 576), "linear_fc2": (576, 1536)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("vblora")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


def test_a_vector_length_that_does_not_divide_is_refused_with_those_that_do():
    (problem,) = VBLoRA().misfits(SMOLLM2)
    assert problem.where == "peft.vector_length"
    assert problem.what == "256 does not divide both the out and in features of linear_qkv, 960 and 576"
    assert problem.allowed == "24, 32, 48, 64, 96, 192"
    for length in (32, 64, 192):
        assert not list(VBLoRA(vector_length=length).misfits(SMOLLM2))
    assert not list(VBLoRA().misfits({"linear_fc2": (2048, 8192)}))


def test_settings_that_do_not_fit_are_refused():
    (problem,) = VBLoRA(num_vectors=4, topk=5).check(20)
    assert (problem.where, problem.allowed) == ("peft.topk", "2 to 4")
    (problem,) = VBLoRA(dim=600, vector_length=64).misfits(SMOLLM2)
    assert (problem.where, problem.allowed) == ("peft.dim", "1 to 576")
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        VBLoRA(topk=1)
    assert VBLoRA().bridge_section() is None


def test_it_starts_near_the_base_and_not_at_it():
    with torch.no_grad():
        off = (adapted(CASE).decoder(IDS, BOUNDS) - random_decoder()(IDS, BOUNDS)).abs().max()
    assert 0 < off < 0.03


def test_the_bank_is_drawn_between_its_bounds_and_there_only_once():
    adapters = adapted(CASE)
    names = [name for name in adapters.parameters() if "vector_bank" in name]
    assert names == ["adapter.vector_bank"]
    bank = adapters.shared.vector_bank
    assert bank.shape == (20, 16)
    # Of 320 uniform draws some come near both bounds, and their mean to zero (deviation 0.00065).
    assert -0.02 <= bank.min() < -0.018
    assert 0.018 < bank.max() <= 0.02
    assert bank.mean().abs() < 0.003
    assert [name for name in adapters.tensors() if "vector_bank" in name] == names


def test_indices_take_as_few_bytes_as_they_can():
    assert [index_dtype(count) for count in (2, 256, 257, 2**15, 2**15 + 1)] == [
        torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32
    ]  # fmt: skip
    dtype = index_dtype(256)
    assert torch.tensor([255]).to(dtype).long() == 255
    assert torch.tensor([2**15 - 1]).to(index_dtype(2**15)).long() == 2**15 - 1


@pytest.mark.parametrize(("num_vectors", "dtype"), [(20, torch.uint8), (300, torch.int16)])
def test_the_file_holds_the_bank_the_indices_and_a_logit_less_than_these(root, tmp_path, num_vectors, dtype):
    case = {**CASE, "num_vectors": num_vectors}
    train(root, peft=case, checkpoint={"save": str(tmp_path / "vb")})
    adapter = open_adapter(tmp_path / "vb")
    section = VBLoRA(**case)
    names = chosen(section, SHAPE.num_layers)
    assert set(adapter.linears) == set(names)
    assert {name: tensor.shape for name, tensor in adapter.shared.items()} == {"vector_bank": (num_vectors, 16)}
    numbers = size = 0
    for entry in adapter.linears.values():
        assert {name: getattr(torch, tensor.dtype) for name, tensor in entry.items()} == {
            "linear_in.indices": dtype, "linear_in.logits": torch.float32,
            "linear_out.indices": dtype, "linear_out.logits": torch.float32,
        }  # fmt: skip
        assert entry["linear_in.indices"].load().dtype == dtype
        numbers += sum(tensor.numel for tensor in entry.values())
        size += sum(tensor.nbytes for tensor in entry.values())
    assert numbers == sum(section.stored(*shape(SHAPE, name)) for name in names)
    # Two indices and one float32 for each sub-vector, where LoRA has vector_length float32.
    pieces = sum(section.sub_vectors(*shape(SHAPE, name)) for name in names)
    assert size == pieces * (2 * dtype.itemsize + 4)
    assert account.trainable(section, SHAPE) == pieces * num_vectors + num_vectors * 16


def test_the_file_alone_gives_the_same_model_to_the_bit(root, tmp_path):
    train(root, peft=CASE, checkpoint={"save": str(tmp_path / "vb")})
    checkpoint = Checkpoint.open(tmp_path / "vb")
    whole, small = adapted(CASE, seed=7), adapted(CASE, seed=8)
    stored = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
    for adapters in (whole, small):
        adapters.load(stored)
    whole.load_memory(checkpoint.training_state()["method"])
    with torch.no_grad():
        one, other = (adapters.decoder.eval()(IDS, BOUNDS) for adapters in (whole, small))
    assert torch.equal(one, other)
    assert all(torch.equal(small.tensors()[name], tensor) for name, tensor in stored.items())
    # What was not chosen is gone from the file, and there with what the run remembers.
    name = "decoder.layers.0.mlp.linear_fc1"
    assert whole.modules[name].linear_in.logits.isfinite().all()
    assert small.modules[name].linear_in.logits.isfinite().sum(-1).eq(2).all()


def test_logits_learn_faster_and_do_not_decay():
    adapters = adapted({**CASE, "logits_lr_ratio": 7.0})
    groups = {name: adapters.method.group(name, value) for name, value in adapters.parameters().items()}
    bank = groups.pop("adapter.vector_bank")
    assert (bank.lr_mult, bank.wd_mult) == (1.0, 1.0)
    assert {(group.lr_mult, group.wd_mult) for group in groups.values()} == {(7.0, 0.0)}


def test_only_the_chosen_logits_and_vectors_have_gradients():
    adapters = adapted(CASE)
    shake(adapters)
    adapters.decoder(IDS, BOUNDS).square().mean().backward()
    used = set()
    for module in adapters.modules.values():
        for side in (module.linear_in, module.linear_out):
            indices = side.logits.topk(2).indices
            chosen_here = torch.zeros_like(side.logits, dtype=torch.bool).scatter_(-1, indices, True)
            assert not side.logits.grad[~chosen_here].any()
            used |= set(indices.flatten().tolist())
    assert set(adapters.shared.vector_bank.grad.any(1).nonzero().flatten().tolist()) <= used
