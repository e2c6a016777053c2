"""DoRA against Hugging Face peft, which builds B A to take its rows' norms."""

from __future__ import annotations

import pytest
import torch
from support.peft_pairs import EXACT, TENSORS, THROUGH, LinearPair, ModelPair, off, reference_adamw

from steps.config.peft.dora import DoRA

peft = pytest.importorskip("peft")


def pair(dropout=0.0, **options) -> LinearPair:
    section = DoRA(dim=4, alpha=10, dropout=dropout)
    settings = peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, lora_dropout=dropout, target_modules=["proj"])
    return LinearPair(section, settings, **options)


@pytest.fixture(params=EXACT, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", ["no dropout", "dropout in eval", "dropout in training"])
def test_forward_and_gradients(mode, bias, dtype):
    both = pair(0.0 if mode == "no dropout" else 0.3, dtype=dtype, bias=bias)
    training = mode == "dropout in training"
    both.mine.train(training)
    both.theirs.train(training)
    found = []
    for side in (both.mine, both.theirs):
        torch.manual_seed(0)  # the same values are dropped
        found.append(side(both.x))
    mine, theirs = found
    assert off(mine, theirs) < EXACT[dtype]
    assert off(mine, both.mine.project(both.x)) > 0.1
    wanted = torch.ones_like(mine)
    trained = list(zip(*both.tensors(), strict=True))
    gradients = [
        torch.autograd.grad(out, [both.x, *tensors], wanted) for out, tensors in zip(found, trained, strict=True)
    ]
    assert len(gradients[0]) == 4
    for got, expected in zip(*gradients, strict=True):
        assert off(got, expected) < EXACT[dtype]


def test_the_magnitude_starts_as_pefts():
    """To float32 rounding. On a bfloat16 base peft's is rounded to bfloat16, so that it does not start from the base:
    ours is the norm."""
    mine, theirs = magnitudes(pair(moved=False))
    assert off(mine, theirs) < 1e-6
    both = pair(base_dtype=torch.bfloat16, moved=False)
    mine, theirs = magnitudes(both)
    exact = both.mine.weight.double().norm(dim=1)
    assert off(mine, exact) < 1e-6
    assert 1e-4 < off(theirs, exact) < 2**-9


def magnitudes(both):
    return both.adapter.weight_magnitude, both.theirs.get_parameter(TENSORS["weight_magnitude"])


def test_three_adamw_steps(dtype):
    both = pair(dtype=dtype)
    before = [mine.detach().clone() for mine, _ in both.tensors()]
    theirs = [tensor for _, tensor in both.tensors()]
    matrices = [tensor for tensor in theirs if tensor.ndim > 1]
    vectors = [tensor for tensor in theirs if tensor.ndim == 1]
    assert len(vectors) == 1  # the magnitude, which is not decayed
    both.train(3, reference=reference_adamw(matrices, vectors))
    for old, (mine, expected) in zip(before, both.tensors(), strict=True):
        assert off(mine, old) > 0.01
        assert off(mine, expected) < EXACT[dtype]


def test_merged_weights_are_pefts_to_the_bit():
    """Float32 factors on a bfloat16 base: everything in float32, one rounding at the end."""
    both = pair(base_dtype=torch.bfloat16)
    before = both.mine.weight.clone()
    mine, theirs = both.merged()
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, before)


def test_zero_rows_follow_the_papers_equation(dtype):
    """m V / ||V|| with V = W + s B A, m = ||W|| at the start. A zero row is zero there, and peft divides by zero."""
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
    weight[[3, 20]] = 0
    both = pair(weight=weight, dtype=dtype, moved=False)
    mine, theirs = both.outputs()
    assert theirs[:, [3, 20]].isnan().all()
    assert off(mine, both.mine.project(both.x)) < 1e-7  # the magnitude is a float32 parameter
    assert not mine[:, [3, 20]].any()
    assert all(value.isfinite().all() for value in torch.autograd.grad(mine.sum(), list(both.adapter.parameters())))
    merged, _ = both.merged()
    assert not merged[[3, 20]].any()
    assert merged.isfinite().all()

    both = pair(weight=weight, dtype=dtype)  # B and m are no longer zero: V has a direction, and peft is right again
    a, b = both.adapter.linear_in.weight.double(), both.adapter.linear_out.weight.double()
    v = weight.double() + 2.5 * b @ a
    wanted = both.x.double() @ (both.adapter.weight_magnitude.double()[:, None] * v / v.norm(dim=1, keepdim=True)).T
    mine, theirs = both.outputs()
    assert off(mine, wanted) < EXACT[dtype]
    assert off(theirs, wanted) < EXACT[dtype]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_model(family, dtype, tmp_path):
    """Fused linears: their magnitudes are those of the parts, one below the other."""
    settings = peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, task_type="CAUSAL_LM")
    both = ModelPair(tmp_path, family, dtype, DoRA(dim=4, alpha=10), settings)
    mine, theirs = both.logits()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=THROUGH[dtype])
    for loss in both.losses():
        loss.backward()
    compared = 0
    for got, expected in both.gradients():
        assert off(got, expected) < THROUGH[dtype]
        compared += 1
    assert compared == both.config.num_layers * (4 + 7 + 7)
    for got, expected in both.merged():
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


def test_a_merged_model_to_the_bit(tmp_path):
    settings = peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, task_type="CAUSAL_LM")
    both = ModelPair(tmp_path, "qwen2", torch.bfloat16, DoRA(dim=4, alpha=10), settings)
    for got, expected in both.merged():
        assert torch.equal(got.bfloat16(), expected)
