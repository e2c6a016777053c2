"""Canonical LoRA is Hugging Face peft's LoRA on q, k, v, gate and up by themselves."""

from __future__ import annotations

import pytest
import torch
from support.adapters import adapted
from support.packed import SHAPE
from support.peft_pairs import EXACT, STEPPED, THROUGH, ModelPair, off

from steps.config.peft.canonical_lora import CanonicalLoRA
from steps.engine.adapters.canonical_lora import NAMES
from steps.engine.checkpoint.mapping import part_view
from steps.shapes.targets import PARTS

peft = pytest.importorskip("peft")


def model(directory, family, dtype, **section) -> ModelPair:
    settings = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM")
    return ModelPair(directory, family, dtype, CanonicalLoRA(dim=4, alpha=10, **section), settings)


@pytest.fixture(params=EXACT, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_forward_gradients_and_merge(family, dtype, tmp_path):
    both = model(tmp_path, family, dtype)
    mine, theirs = both.logits()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=THROUGH[dtype])
    with both.model.disable_adapter():
        assert (both.logits()[1] - theirs).abs().max() > 0.1
    for loss in both.losses():
        loss.backward()
    compared = 0
    for got, expected in both.gradients():
        assert off(got, expected) < THROUGH[dtype]
        compared += 1
    assert compared == both.config.num_layers * 7 * 2
    for got, expected in both.merged():
        # peft merges in the base's dtype, float64 or float32, and we in float32.
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_three_adamw_steps(family, dtype, tmp_path):
    both = model(tmp_path, family, dtype)
    before = [mine.clone() for mine, _ in both.values()]
    both.train(3)
    for old, (mine, expected) in zip(before, both.values(), strict=True):
        assert off(mine, old) > 0.05
        assert off(mine, expected) < STEPPED


def test_a_merged_model_to_the_bit(tmp_path):
    """Float32 factors on a bfloat16 base: product, scale and sum in float32, one rounding at the end."""
    both = model(tmp_path, "qwen2", torch.bfloat16)
    for got, expected in both.merged():
        assert torch.equal(got.bfloat16(), expected)


def test_some_parts_of_a_fused_linear(tmp_path):
    """What is not adapted is left alone: peft has no layer there."""
    both = model(tmp_path, "qwen2", torch.float64, target_modules=["linear_fc2", "linear_proj"])
    mine, theirs = both.logits()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=THROUGH[torch.float64])


def test_with_tied_factors_it_is_lora():
    """One A for the parts of each fused linear, and the fused B's rows: the same function, and the fused A's gradient
    is the sum of the parts'."""
    shape = {"dtype": torch.float64}
    whole = adapted({"type": "lora", "dim": 4, "alpha": 10}, **shape)
    parts = adapted({"type": "canonical_lora", "dim": 4, "alpha": 10}, **shape)
    draw = torch.Generator().manual_seed(0)
    for name, module in whole.modules.items():
        module.double()
        parts.modules[name].double()
        a, b = module.linear_in.weight, module.linear_out.weight
        a.data.copy_(torch.randn(a.shape, generator=draw) / 6)
        b.data.copy_(torch.randn(b.shape, generator=draw) / 6)
        for pair, rows in _pairs(parts.modules[name], name, b.data):
            pair.linear_in.weight.data.copy_(a.data)
            pair.linear_out.weight.data.copy_(rows)
    ids = torch.randint(SHAPE.vocab_size, (40,), generator=draw)
    logits = [adapters.decoder(ids, [0, 13, 40]) for adapters in (whole, parts)]
    assert off(*logits) < EXACT[torch.float64]
    for one in logits:
        one.square().mean().backward()
    for name, module in whole.modules.items():
        found = _pairs(parts.modules[name], name, module.linear_out.weight.grad)
        assert len(found) == len(PARTS.get(name.rpartition(".")[2], [""]))
        for pair, rows in found:
            assert off(pair.linear_out.weight.grad, rows) < EXACT[torch.float64]
        together = sum(pair.linear_in.weight.grad for pair, _ in found)
        assert off(together, module.linear_in.weight.grad) < EXACT[torch.float64]


def _pairs(module, name, rows):
    """Each pair of factors of a canonical adapter with its part of the rows [out, r] of the fused linear."""
    parts = PARTS.get(name.rpartition(".")[2])
    if parts is None:
        return [(module, rows)]
    return [(module.get_submodule(NAMES[part]), part_view(SHAPE, part, rows.T).reshape(4, -1).T) for part in parts]
