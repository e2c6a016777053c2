from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted, shake, train
from support.packed import SHAPE, random_rows, write_base, write_packed

from steps.artifacts import record
from steps.config.peft.adalora import AdaLoRA
from steps.engine.adapters.adalora import AdaLoRAAdapter, largest
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.checkpoint.merge import open_adapter

LINEARS = 4 * SHAPE.num_layers


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("adalora")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


def problems(train_iters: int, **settings) -> dict[str, str]:
    return {problem.where: str(problem) for problem in AdaLoRA(**settings).check(train_iters)}


@pytest.mark.parametrize("train_iters", [1, 2, 3, 7, 20, 1000])
def test_the_defaults_suit_a_run_of_any_length(train_iters):
    assert not problems(train_iters)
    section = AdaLoRA()
    tinit, tfinal, interval = section.phases(train_iters)
    assert 0 <= tinit <= train_iters // 10
    assert tinit + tfinal < train_iters
    assert interval >= 1
    assert section.budget(train_iters, train_iters, 5) == 5 * section.target_r


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_what_is_left_out_never_makes_a_schedule_impossible(train_iters, tinit, tfinal):
    """A half of the schedule that fits by itself is completed to one that fits."""
    assert ("peft.tinit" in problems(train_iters, tinit=tinit)) == (tinit >= train_iters)
    assert ("peft.tfinal" in problems(train_iters, tfinal=tfinal)) == (tfinal >= train_iters)


def test_settings_that_contradict_each_other_are_refused():
    found = problems(20, dim=4, target_r=6, tinit=15, tfinal=5)
    assert "6 is above dim (4), the rank at the start: ranks only shrink" in found["peft.target_r"]
    assert "1 to 4" in found["peft.target_r"]
    assert "tinit (15) and tfinal (5) leave no optimizer step to prune in" in found["peft.tinit"]
    assert "below train_iters (20)" in found["peft.tinit"]
    assert "Leave both out" in found["peft.tinit"]
    assert AdaLoRA().bridge_section() is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=5), st.data())
def test_exactly_as_many_triplets_are_kept_as_the_budget_says_also_where_scores_are_equal(scores, data):
    vectors = [torch.tensor(values, dtype=torch.float32) for values in scores]
    count = data.draw(st.integers(0, sum(map(len, vectors))))
    masks = largest(vectors, count)
    assert [len(mask) for mask in masks] == [len(vector) for vector in vectors]
    flat, kept = torch.cat(vectors).tolist(), torch.cat(masks).tolist()
    assert sum(kept) == count
    # By score, then by place.
    order = sorted(range(len(flat)), key=lambda at: (-flat[at], at))
    assert [at for at in order if kept[at]] == order[:count]


@pytest.mark.parametrize("train_iters", [1, 4, 12])
def test_a_run_ends_with_the_ranks_of_its_budget_and_records_them(root, tmp_path, train_iters):
    save = tmp_path / "lora"
    case = {"type": "adalora", "dim": 5, "alpha": 32, "target_r": 2}
    scheduler = {"lr_warmup_iters": 0, "lr_decay_style": "constant"}
    train(root, peft=case, train={"train_iters": train_iters}, checkpoint={"save": str(save)}, scheduler=scheduler)
    ranks = record.read(save).facts["ranks"]
    stored = open_adapter(save).linears
    assert ranks == {name: int(entry["singular_values"].load().count_nonzero()) for name, entry in stored.items()}
    assert sum(ranks.values()) == 2 * LINEARS
    assert len(ranks) == LINEARS
    # What was pruned keeps its vectors, but no other trace; the statistics are no part of the adapter.
    assert {name for entry in stored.values() for name in entry} == {
        "linear_in.weight", "linear_out.weight", "singular_values"
    }  # fmt: skip
    remembered = Checkpoint.open(save).training_state()["method"]
    assert len(remembered) == 7 * LINEARS
    assert all(".adapter." in name for name in remembered)


def test_a_run_that_is_made_longer_shrinks_along_its_new_schedule(root, tmp_path):
    save, case = {"save": str(tmp_path / "lora")}, {"type": "adalora", "dim": 5, "alpha": 32, "target_r": 2}
    scheduler = {"lr_warmup_iters": 0, "lr_decay_style": "constant"}
    for train_iters in (6, 18):
        train(root, peft=case, checkpoint=save, scheduler=scheduler, train={"train_iters": train_iters})
        assert sum(record.read(tmp_path / "lora").facts["ranks"].values()) == 2 * LINEARS
    assert record.read(tmp_path / "lora").facts["iteration"] == 18


def test_pruned_triplets_can_be_dropped_from_the_factors():
    adapters = adapted({"type": "adalora", "dim": 5, "target_r": 2})
    shake(adapters)
    generator = torch.Generator().manual_seed(1)
    for module in adapters.modules.values():
        for value in module.parameters():
            value.grad = torch.randn(value.shape, generator=generator)
    adapters.method.after_step(adapters, 4, 12)
    adapters.method.after_step(adapters, 8, 12)
    ranks = adapters.method.report(adapters)["ranks"]
    assert sum(ranks.values()) == adapters.method.section.budget(8, 12, LINEARS) < 5 * LINEARS
    assert len(set(ranks.values())) > 1, "the ranks differ among linears"
    for name, module in adapters.modules.items():
        whole = adapters.method.factors(name, module.saved(), {})[""]
        small = whole.compact()
        assert len(whole.a) == 5
        assert len(small.a) == small.b.shape[1] == ranks[name]
        torch.testing.assert_close(small.delta(), whole.delta(), rtol=1e-5, atol=1e-6)  # sums of fewer terms
    told = adapters.method.summary(adapters)
    assert told.startswith(f"{sum(ranks.values())} of {5 * LINEARS} triplets kept; mean ranks: linear_qkv ")
    assert all(kind in told for kind in ("linear_proj", "linear_fc1", "linear_fc2"))


def test_bfloat16_parameters_compute_what_is_merged():
    """The product of a value and its vector is rounded on neither way."""
    adapters = adapted({"type": "adalora", "dim": 5, "target_r": 2, "lora_dtype": "bfloat16"})
    shake(adapters)
    for name, module in adapters.modules.items():
        linear = adapters.decoder.linears()[name]
        with torch.no_grad():
            computed = module.eval()(torch.eye(linear.in_features), linear).T
            merged = adapters.method.merge(name, linear.weight, module.saved(), {})
        # Float32, two ways of summing; a product rounded to bfloat16 would be 1e-3 off.
        torch.testing.assert_close(computed, merged, rtol=0, atol=1e-6)


def test_once_the_ranks_are_final_gradients_change_nothing_any_more():
    adapters = adapted({"type": "adalora", "dim": 5, "target_r": 2, "tinit": 1, "tfinal": 4})
    generator = torch.Generator().manual_seed(1)
    remembered = {}
    for iteration in range(1, 13):
        shake(adapters, iteration)
        for value in adapters.parameters().values():
            value.grad = torch.randn(value.shape, generator=generator)
        adapters.method.after_step(adapters, iteration, 12)
        if iteration in (7, 8):
            remembered[iteration] = {name: tensor.clone() for name, tensor in adapters.memory().items()}
    now = adapters.memory()
    assert all(torch.equal(now[name], tensor) for name, tensor in remembered[8].items())
    # The last pruning, at step 8, goes by what was seen before it.
    before = remembered[7]
    assert all(torch.equal(now[name], before[name]) for name in now if not name.endswith(".kept"))
    assert sum(adapters.method.report(adapters)["ranks"].values()) == 2 * LINEARS


def test_nothing_is_pruned_where_the_rank_may_stay():
    adapters = adapted({"type": "adalora", "dim": 4, "target_r": 4})
    shake(adapters)
    for value in adapters.parameters().values():
        value.grad = torch.ones_like(value)
    for iteration in range(1, 13):
        adapters.method.after_step(adapters, iteration, 12)
    assert set(adapters.method.report(adapters)["ranks"].values()) == {4}


def test_statistics_of_bfloat16_adapters_are_float32():
    adapters = adapted({"type": "adalora", "dim": 4, "target_r": 2, "lora_dtype": "bfloat16"})
    for name, module in adapters.modules.items():
        assert isinstance(module, AdaLoRAAdapter)
        assert all(value.dtype == torch.bfloat16 for value in module.parameters())
        memory = module.memory()
        assert {value.dtype for key, value in memory.items() if key != "kept"} == {torch.float32}, name
        assert memory["kept"].dtype == torch.bool
    shake(adapters)
    penalty = adapters.method.penalty(adapters)
    assert penalty.dtype == torch.float32
    penalty.backward()


def test_without_its_weight_there_is_no_orthogonality_term():
    assert adapted({"type": "adalora", "dim": 4, "target_r": 2, "orth_reg_weight": 0.0}).method.penalty(None) is None
