"""AdaLoRA against Hugging Face peft: the same weights, the same numbers, the same triplets pruned.

peft scales by lora_alpha / (r + 1e-5), ours is alpha / dim. So that both scales agree, peft is given
lora_alpha = scale * (r + 1e-5).
"""

from __future__ import annotations

import pytest
import torch
from support.peft_stacks import LlamaPair, Pair, loss, off, shaken
from torch.nn import functional as F

from steps.config.peft.adalora import AdaLoRA

peft = pytest.importorskip("peft")

# Rounding of sums of up to 64 terms through three layers; float32 has 1.2e-7 for each operation, float64 2.2e-16.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
DIM, TARGET, SCALE = 6, 2, 1.5
STEPS, TINIT, TFINAL, DELTA = 16, 2, 3, 2
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def section(**changes) -> AdaLoRA:
    values = {"dim": DIM, "target_r": TARGET, "tinit": TINIT, "tfinal": TFINAL, "deltaT": DELTA, **changes}
    return AdaLoRA(alpha=SCALE * values["dim"], **values)


def settings(dim: int = DIM, **changes):
    values = {
        "init_r": dim, "target_r": TARGET, "tinit": TINIT, "tfinal": TFINAL, "deltaT": DELTA, "total_step": STEPS,
        "lora_alpha": SCALE * (dim + 1e-5), "target_modules": ["first", "second", "third"], **changes,
    }  # fmt: skip
    return peft.AdaLoraConfig(**values)


def alike(layers) -> None:
    """The same random singular values and vectors on both sides."""
    generator = torch.Generator().manual_seed(1)
    for mine, theirs in layers:
        for value, other in parameters(mine, theirs):
            value.data.copy_(shaken(value.shape, generator))
            other.data.copy_(value.data.view_as(other))


def parameters(mine, theirs):
    yield mine.linear_in.weight, theirs.lora_A["default"]
    yield mine.singular_values, theirs.lora_E["default"]
    yield mine.linear_out.weight, theirs.lora_B["default"]


def pair(dtype: torch.dtype, **changes) -> Pair:
    made = Pair(section(**changes), settings(), dtype)
    alike(made.layers())
    for _, layer in made.layers():
        # On any base but a float32 one peft makes its divisor trainable; see the last test but one.
        layer.ranknum["default"].requires_grad_(False)
    return made


def backward(made: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the loss with the orthogonality term on both sides; returns the two losses."""
    mine = loss(made.decoder(made.x), made.target)
    penalty = made.adapters.method.penalty(made.adapters)
    mine.backward()
    penalty.backward()
    # Called through `base_model`: PeftModel without a task leaves the orthogonality term out.
    theirs = made.model.base_model(made.x, made.target).loss
    theirs.backward()
    return mine + penalty, theirs


@every_dtype
def test_forward_and_gradients(dtype):
    made = pair(dtype)
    ours, theirs = (made.x.clone().requires_grad_() for _ in range(2))
    out, expected = made.decoder(ours), made.model.base_model(theirs, made.target)
    assert off(out, expected.out) < DTYPES[dtype]
    loss(out, made.target).backward()
    loss(expected.out, made.target).backward()
    assert off(ours.grad, theirs.grad) < DTYPES[dtype]
    for value, other in (both for layers in made.layers() for both in parameters(*layers)):
        assert off(value.grad, other.grad.view_as(value)) < DTYPES[dtype]


@every_dtype
def test_the_orthogonality_term_and_its_gradients(dtype):
    made = pair(dtype)
    mine, theirs = backward(made)
    assert mine.item() == pytest.approx(theirs.item(), rel=DTYPES[dtype])
    plain = loss(made.decoder(made.x), made.target).item()
    assert mine.item() > plain + 0.1  # the term is not lost in the loss
    for value, other in (both for layers in made.layers() for both in parameters(*layers)):
        assert off(value.grad, other.grad.view_as(value)) < DTYPES[dtype]


@pytest.mark.parametrize(
    ("steps", "tinit", "tfinal", "interval"), [(16, 2, 3, 2), (20, 0, 0, 1), (1000, 100, 270, 10), (97, 13, 41, 7)]
)
def test_the_budget_of_every_step(steps, tinit, tfinal, interval):
    changes = {"tinit": tinit, "tfinal": tfinal, "deltaT": interval}
    made = Pair(section(**changes), settings(total_step=steps, **changes), torch.float32)
    allocator = made.model.base_model.rankallocator
    theirs = [allocator.budget_schedule(step)[0] for step in range(1, steps + 1)]
    mine = [made.adapters.method.section.budget(step, steps, 3) for step in range(1, steps + 1)]
    assert mine == theirs
    assert mine[-1] == 3 * TARGET
    assert sorted(mine, reverse=True) == mine


@every_dtype
def test_a_whole_run_prunes_the_same_and_learns_the_same(dtype):
    """AdamW through all phases: initial, pruning at every other step, final."""
    made = pair(dtype)
    trained = [value for layers in made.layers() for value, _ in parameters(*layers)]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    reference = torch.optim.AdamW(
        [value for value in made.model.parameters() if value.requires_grad], lr=0.01, weight_decay=0.0
    )
    before = [value.detach().clone() for value in trained]
    pruned = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        reference.zero_grad()
        backward(made)
        optimizer.step()
        reference.step()
        made.adapters.method.after_step(made.adapters, step, STEPS)
        made.model.base_model.update_and_allocate(step)
        if step < STEPS - TFINAL:
            same_statistics(made, dtype)
        masks = [(mine.singular_values == 0, theirs.lora_E["default"] == 0) for mine, theirs in made.layers()]
        assert all(torch.equal(mine, theirs.view(-1)) for mine, theirs in masks)
        pruned.append(sum(int(mine.sum()) for mine, _ in masks))
        # Adam divides each gradient by its own size, yet on these not one is small enough for noise to grow.
        for value, other in (both for layers in made.layers() for both in parameters(*layers)):
            assert off(value, other.view_as(value)) < DTYPES[dtype]
    # Nothing until tinit; at odd steps what was pruned moves again; at the end all is pruned, and stays so.
    assert pruned[:3] == [0, 0, 0]
    assert 0 < pruned[3] < pruned[5] < pruned[12] == 3 * (DIM - TARGET)
    assert pruned[4] == pruned[6] == 0
    assert pruned[12:] == [pruned[12]] * 4
    assert all(off(value, start) > 0.01 for value, start in zip(trained, before, strict=True))


def same_statistics(made: Pair, dtype: torch.dtype) -> None:
    allocator, names = made.model.base_model.rankallocator, ("linear_in", "singular_values", "linear_out")
    for linear, module in made.adapters.modules.items():
        memory = module.memory()
        for name, letter in zip(names, "AEB", strict=True):
            for kind, theirs in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
                mine = memory[f"{name}_importance.{kind}"]
                # Differences of products: their rounding is a little larger than that of the gradients.
                assert off(mine, theirs[f"{linear}.lora_{letter}.default"].view_as(mine)) < 4 * DTYPES[dtype]


def test_merged_weights_of_a_bfloat16_base_are_bitwise_the_same():
    """At rank 256, where r + 1e-5 is r in float32 and peft's division by it exact. Both round once, at the end."""
    dim, shapes = 256, {"first": (320, 256)}
    made = Pair(
        section(dim=dim), settings(dim, lora_alpha=SCALE * dim, target_modules=["first"]), torch.bfloat16, shapes,
        adapter_dtype=torch.float32,
    )  # fmt: skip
    alike(made.layers())
    mine, theirs = merged(made)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, made.decoder.linears()["first"].weight)


def test_merged_weights_of_a_small_rank_differ_where_peft_rounds_otherwise():
    """r + 1e-5 is no power of two: peft's product and quotient round twice in float32, which can tip the last bit of
    a bfloat16 that lies between two others; never more than that."""
    made = Pair(
        section(), settings(target_modules=["first"]), torch.bfloat16, {"first": (64, 32)}, adapter_dtype=torch.float32
    )
    alike(made.layers())
    mine, theirs = merged(made)
    unequal = mine != theirs
    assert unequal.float().mean() < 0.01
    torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=0)


def merged(made: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """The first linear's merged weight, both ways, in the base's dtype."""
    weight = made.decoder.linears()["first"].weight
    saved = {name: tensor.detach() for name, tensor in made.adapters.modules["first"].saved().items()}
    mine = made.adapters.method.merge("first", weight.float(), saved, {}).to(weight.dtype)
    return mine, made.model.merge_and_unload().get_submodule("first").weight.detach()


def test_on_a_bfloat16_base_the_scale_stays_what_it_is():
    """W + s P Λ Q with one s (equation 3). peft makes its divisor trainable there, moves it, and does not save it."""
    made = Pair(section(), settings(), torch.bfloat16, adapter_dtype=torch.float32)
    alike(made.layers())
    trained = [value for layers in made.layers() for value, _ in parameters(*layers)]
    theirs = [value for value in made.model.parameters() if value.requires_grad]
    for values in (trained, theirs):
        optimizer = torch.optim.AdamW(values, lr=0.05, weight_decay=0.0)
        for _ in range(10):
            optimizer.zero_grad()
            if values is trained:
                loss(made.decoder(made.x).float(), made.target.float()).backward()
            else:
                made.model.base_model(made.x, made.target).loss.backward()
            optimizer.step()
    saved = peft.get_peft_model_state_dict(made.model)
    assert not any("ranknum" in name for name in saved)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    name, linear = next(iter(made.decoder.linears().items()))
    ((mine, other), *_) = made.layers()
    assert abs(other.ranknum["default"].item() - DIM) > 0.1, "peft keeps its divisor: this test and the note can go"

    def equation(right, value, left) -> torch.Tensor:
        weight = linear.weight.double() + SCALE * left.double() @ (value.double().view(-1, 1) * right.double())
        return F.linear(x.double(), weight, linear.bias.double())

    with torch.no_grad():
        ours = off(linear(x).double(), equation(*(value for value, _ in parameters(mine, other))))
        peft_is = off(other(x).double(), equation(*(value for _, value in parameters(mine, other))))
    # bfloat16 has eight bits: 2^-8 for the output's rounding, a little more for that of the factors.
    assert ours < 1e-2, name
    assert peft_is > 3 * ours


@every_dtype
def test_logits_of_a_llama(dtype, tmp_path):
    targets = ["linear_proj", "linear_fc2"]
    made = LlamaPair(
        tmp_path,
        section(target_modules=targets),
        settings(target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM"),
        dtype,
    )
    alike(made.layers())
    mine, theirs = made.logits()
    # In float64 only what transformers always does in float32 (norms, rotation, softmax) makes a difference.
    torch.testing.assert_close(mine, theirs, rtol=0, atol={torch.float64: 2e-6, torch.float32: 2e-4}[dtype])
