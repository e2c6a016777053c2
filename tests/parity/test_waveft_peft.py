"""WaveFT against Hugging Face peft, which builds the whole update: same positions, same sub-bands, same numbers."""

from __future__ import annotations

import pytest
import torch
from support.peft_pairs import EXACT, THROUGH, LinearPair, ModelPair, off

from steps.config.peft.waveft import WaveFT
from steps.engine.adapters.waveft import Positions

peft = pytest.importorskip("peft")

# Even sides, odd ones, a matrix with a single row, and coefficients everywhere.
SHAPES = {"even": (24, 16, 60), "odd rows": (25, 16, 60), "odd": (23, 17, 391), "one row": (1, 6, 3)}


def pair(shape=(24, 16, 60), **options) -> LinearPair:
    *sides, count = shape
    section = WaveFT(n_frequency=count, scaling=5, random_loc_seed=11)
    settings = peft.WaveFTConfig(n_frequency=count, scaling=5, random_loc_seed=11, target_modules=["proj"])
    return LinearPair(section, settings, tuple(sides), **options)


@pytest.fixture(params=EXACT, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, bias, dtype):
    both = pair(shape, dtype=dtype, bias=bias)
    mine, theirs = both.outputs()
    # peft's filters are 1 / sqrt(2) rounded to the weights' dtype, ours exact: that rounding is within the bound.
    assert off(mine, theirs) < EXACT[dtype]
    assert off(mine, both.mine.project(both.x)) > 0.1
    for got, expected in both.gradients():
        assert off(got, expected) < EXACT[dtype]


def test_the_settings_are_pefts_defaults():
    mine, theirs = WaveFT(), peft.WaveFTConfig()
    for name in ("n_frequency", "scaling", "random_loc_seed", "wavelet_family"):
        assert getattr(mine, name) == getattr(theirs, name)


def test_the_start_is_pefts():
    both = pair(moved=False)
    ((mine, theirs),) = both.tensors()
    assert torch.equal(mine, theirs)
    assert not mine.any()


def test_three_adamw_steps(dtype):
    both = pair(dtype=dtype)
    ((mine, theirs),) = both.tensors()
    before = mine.detach().clone()
    both.train(3)
    assert off(mine, before) > 0.01
    assert off(mine, theirs) < EXACT[dtype]


def test_merged_weights_are_pefts_to_the_bit():
    """peft's float32 filter is 3e-8 short of 1 / sqrt(2). That could turn over a rounding to bfloat16 (once in some
    100,000 values); for these it does not."""
    for shape in SHAPES.values():
        mine, theirs = pair(shape, base_dtype=torch.bfloat16).merged()
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs)
    mine, theirs = pair().merged()
    assert off(mine, theirs) < 2e-7  # two float32 roundings


def test_a_model(tmp_path, dtype):
    """linear_proj and linear_fc2, which stand unfused on both sides: a fused one has other positions than its parts."""
    section = WaveFT(n_frequency=100, scaling=5, target_modules=["linear_proj", "linear_fc2"])
    settings = peft.WaveFTConfig(n_frequency=100, scaling=5, task_type="CAUSAL_LM")
    both = ModelPair(tmp_path, "llama", dtype, section, settings)
    mine, theirs = both.logits()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=THROUGH[dtype])
    with both.model.disable_adapter():
        assert (both.logits()[1] - theirs).abs().max() > 0.1
    for loss in both.losses():
        loss.backward()
    for got, expected in both.gradients():
        assert off(got, expected) < THROUGH[dtype]


def test_the_haar_transform_is_orthonormal():
    """With all coefficients trained, the update's squares sum up to those of the coefficients, times scaling^2."""
    both = pair((24, 16, 384), dtype=torch.float64)
    update = both.mine(torch.eye(16, dtype=torch.float64)) - both.mine.weight.T
    assert update.norm().item() == pytest.approx(5 * both.adapter.spectrum.norm().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_threads_come_to_the_same_bits(dtype):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            both = pair((192, 512, 2592), base_dtype=dtype)
            x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
            base = both.mine.weight.new_zeros(2048, 192)
            both.mine.project = lambda x, base=base: base.clone()  # the update alone: the product is not ours
            out = both.mine(x)
            gradients = torch.autograd.grad(out.float().square().sum(), [x, both.adapter.spectrum])
            found.append((out.detach(), *gradients))
    finally:
        torch.set_num_threads(before)
    one, *others = found
    assert all(value.abs().sum() > 0 for value in one)
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_bfloat16_rounds_four_times():
    """The coefficients, the transformed input, its product and the output, each to 8 bits; sums run in float32."""
    both = pair((192, 128, 2592), base_dtype=torch.bfloat16)
    weight, saved = both.mine.weight.double(), {"spectrum": both.adapter.spectrum.detach()}
    update = both.method.merge("", both.mine.weight.float(), saved, {}).double() - weight
    zero = torch.zeros(30, 192, dtype=torch.bfloat16)
    both.mine.project = lambda x: zero.clone()
    # Four independent errors of at most 2^-9 each.
    assert off(both.mine(both.x), both.x.double() @ update.T) < 4**0.5 * 2**-9


def test_positions_are_drawn_once_for_a_shape():
    both = pair()
    assert both.method.positions(24, 16) is both.adapter.positions
    assert not any("position" in name for name in both.adapter.state_dict())
    assert Positions(24, 16, 60, 12).rows.tolist() != both.adapter.positions.rows.tolist()
