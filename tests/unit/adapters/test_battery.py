"""What must hold of every adapter method, whichever there are."""

from __future__ import annotations

import pytest
import torch
from support.adapters import CASES, DEPARTS, adapted, bare, dense, section, shake, told, train, train_in_two_processes
from support.packed import SHAPE, random_decoder, random_rows, write_base, write_packed

from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.checkpoint.merge import open_adapter
from steps.shapes.account import trainable
from steps.shapes.targets import home

IDS = torch.randint(SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
BOUNDS = [0, 13, 40]
every_case = pytest.mark.parametrize("case", CASES, ids=told)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("battery")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


@every_case
def test_training_starts_from_the_base_model(case):
    """To the bit, where nothing is added at the start; to float32 rounding, where a start is added and taken away."""
    with torch.no_grad():
        start, base = adapted(case).decoder(IDS, BOUNDS), bare(case)(IDS, BOUNDS)
    off = (start - base).abs().max().item()
    allowed = DEPARTS.get(case["type"], 2e-4 if case.get("init_lora_weights") in ("pissa", "olora") else 0.0)
    assert off <= allowed
    if allowed == 0:
        assert torch.equal(start, base)


@every_case
def test_only_adapter_parameters_get_gradients_and_each_of_them_does(case):
    adapters = adapted(case)
    shake(adapters)
    adapters.decoder(IDS, BOUNDS).square().mean().backward()
    for name, parameter in adapters.decoder.named_parameters():
        inside = "adapter" in name.split(".")
        assert parameter.requires_grad == inside
        assert (parameter.grad is not None) == inside, name
        if inside:
            assert parameter.grad.abs().sum() > 0, name


@every_case
def test_the_number_of_trained_parameters_is_what_the_formula_says(case):
    counted = sum(value.numel() for value in adapted(case).parameters().values())
    assert counted == trainable(section(case), SHAPE)


@every_case
def test_merged_weights_compute_what_the_adapters_compute(case):
    adapters = adapted(case)
    shake(adapters)
    adapters.decoder.eval()
    with torch.no_grad():
        got = adapters.decoder(IDS, BOUNDS)
    merged = dense(case)
    shared = {} if adapters.shared is None else adapters.shared.state_dict()
    for name, linear in merged.linears().items():
        if name in adapters.modules:
            tensors = {key: value.detach() for key, value in adapters.modules[name].saved().items()}
            before = linear.weight.data.clone()
            weight = adapters.method.merge(name, linear.weight.data, tensors, shared)
            assert torch.equal(linear.weight.data, before), "merge changed its argument"
            assert weight.dtype == torch.float32
            assert not torch.equal(weight, before)
            linear.weight.data.copy_(weight)
    with torch.no_grad():
        expected = merged(IDS, BOUNDS)
    # float32, two ways of summing; the logits are of order 10.
    torch.testing.assert_close(expected, got, rtol=0, atol=3e-4)
    assert (got - bare(case)(IDS, BOUNDS)).abs().max() > 1e-2


@every_case
@pytest.mark.parametrize(
    ("targets", "linears"),
    [
        ({"target_modules": ["*.layers.1.*"]}, {1: 4}),
        ({"target_modules": ["o_proj", "*.layers.0.*.down_proj"]}, {0: 2, 1: 1}),
        ({"exclude_modules": ["*.mlp.*"]}, {0: 2, 1: 2}),
        ({"match_all_linear": True}, {0: 4, 1: 4}),
    ],
    ids=["wildcard", "names of Hugging Face", "exclude", "all"],
)
def test_targets(case, targets, linears):
    case = {**{key: value for key, value in case.items() if key != "target_modules"}, **targets}
    adapters = adapted(case)
    found: dict[int, int] = {}
    for name in adapters.modules:
        assert home(name) == (name, "")
        layer = int(name.split(".")[2])
        found[layer] = found.get(layer, 0) + 1
    assert found == linears


@every_case
def test_a_start_depends_on_seed_and_place_alone(case):
    """Not on what else is adapted."""
    full, part = adapted(case), adapted({**case, "target_modules": ["linear_fc2"]})
    name = "decoder.layers.1.mlp.linear_fc2"
    if name in full.modules:
        one, other = full.modules[name].saved(), part.modules[name].saved()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@every_case
def test_bfloat16_base_keeps_float32_masters_and_computes_in_bfloat16(case):
    adapters, wide = adapted(case, dtype=torch.bfloat16), adapted(case)
    shake(adapters)
    shake(wide)
    logits = adapters.decoder.eval()(IDS, BOUNDS)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(value.dtype == value.grad.dtype == torch.float32 for value in adapters.parameters().values())
    # So small a random model amplifies each rounding: the base alone, computed in bfloat16, is 3 % off.
    base = _off(bare(case, dtype=torch.bfloat16)(IDS, BOUNDS), bare(case)(IDS, BOUNDS))
    assert _off(logits, wide.decoder.eval()(IDS, BOUNDS)) < 5 * base


@every_case
def test_a_run_lowers_the_loss_and_leaves_the_base_alone(case, root, tmp_path):
    progress = train(root, peft=case, train={"train_iters": 30}, checkpoint={"save": str(tmp_path / "lora")})
    losses = progress.losses()
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    stored, fresh = Checkpoint.open(root / "base"), dict(random_decoder().named_parameters())
    assert all(torch.equal(stored.read(name), value) for name, value in fresh.items())
    adapter = open_adapter(tmp_path / "lora")
    saved, asked = section(adapter.section).model_dump(), section(case).model_dump()
    assert {key: saved[key] for key in case} == {key: asked[key] for key in case}


@every_case
def test_a_stopped_run_goes_on_to_the_same_bits(case, root, tmp_path):
    whole, halves = {"save": str(tmp_path / "whole")}, {"save": str(tmp_path / "halves")}
    schedule = {"lr_decay_iters": 12, "lr_warmup_iters": 2}
    train(root, peft=case, checkpoint=whole, scheduler=schedule)
    stopped = {"train_iters": 12}
    train(root, peft=case, checkpoint=halves, scheduler=schedule, train=stopped)
    # Back to the middle, as if everything after it had never been.
    train(root, peft=case, checkpoint={**halves, "ckpt_step": 6}, scheduler=schedule, train=stopped)
    one, other = (Checkpoint.open(tmp_path / name) for name in ("whole", "halves"))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor.load(), other.tensors[name].load()) for name, tensor in one.tensors.items())
    assert _same(one.training_state(), other.training_state())


@every_case
def test_two_processes_do_the_work_of_one(case, root, tmp_path):
    settings = {"train": {"micro_batch_size": 1}, "peft": case}
    train(root, **settings, checkpoint={"save": str(tmp_path / "one")})
    train_in_two_processes(root, **settings, checkpoint={"save": str(tmp_path / "two")})
    one, two = (Checkpoint.open(tmp_path / name).training_state()["history"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    # Float32 sums in another order, over twelve Adam steps.
    assert all(two[key] == pytest.approx(value, rel=1e-4) for key, value in one.items())


def _off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other
