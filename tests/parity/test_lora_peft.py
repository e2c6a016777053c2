"""LoRA on the fused linears against Hugging Face peft on the unfused model: same weights, same numbers.

A fused linear_qkv with one A and one B is three linears whose A are equal and whose B are the rows of the fused B; so
the gradient of the fused A is the sum of the three. An optimizer step would move the three copies of A apart, so the
step is compared on the linears that are not fused.
"""

from __future__ import annotations

import pytest
import torch
from support.peft_pairs import ADAMW, STEPPED, THROUGH, ModelPair, off, reference_adamw

from steps.config.peft.lora import LoRA
from steps.engine.train.optim import AdamW, Gradients, clip

peft = pytest.importorskip("peft")

LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
FAMILIES = ("llama", "qwen2", "qwen3")


def pair(directory, family: str, dtype: torch.dtype, targets: list[str]) -> ModelPair:
    settings = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM")
    return ModelPair(directory, family, dtype, LoRA(dim=4, alpha=10, target_modules=targets), settings)


@pytest.fixture(params=[(family, dtype) for family in FAMILIES for dtype in THROUGH], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    return request.param


def test_forward_gradients_and_merge(case, tmp_path):
    family, dtype = case
    tolerance = THROUGH[dtype]
    both = pair(tmp_path, family, dtype, LINEARS)
    torch.testing.assert_close(*both.logits(), rtol=0, atol=tolerance)

    mine, theirs = both.losses()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine.backward()
    theirs.backward()
    compared = 0
    for got, expected in both.gradients():
        assert off(got, expected) < tolerance
        compared += 1
    assert compared == both.config.num_layers * (4 + 7)
    for got, expected in both.merged():
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_to_the_bit(family, tmp_path):
    """Float32 factors on a bfloat16 base: product, scale and sum in float32, one rounding at the end."""
    both = pair(tmp_path, family, torch.bfloat16, LINEARS)
    for got, expected in both.merged():
        assert torch.equal(got.bfloat16(), expected)


def test_one_adamw_step(case, tmp_path):
    family, dtype = case
    both = pair(tmp_path, family, dtype, ["linear_proj", "linear_fc2"])
    gradients, optimizer = Gradients(both.adapters.parameters()), AdamW(both.adapters, ADAMW)
    trained = both.trained()
    reference = reference_adamw(trained)

    mine, theirs = both.losses()
    mine.backward()
    theirs.backward()
    norm = gradients.norm()
    # Adam's first step hardly depends on the gradients' scale, so the clipped gradients are compared by themselves.
    wanted = torch.nn.utils.clip_grad_norm_(trained, 0.05)
    assert norm == pytest.approx(wanted.item(), rel=1e-5)
    assert norm > 0.05
    clip(gradients, norm, 0.05)
    for got, expected in both.gradients():
        assert off(got, expected) < THROUGH[dtype]
    before = [value.detach().clone() for value in both.adapters.parameters().values()]
    optimizer.step(0.01)
    reference.step()
    after = list(both.adapters.parameters().values())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for value, expected in both.values():
        assert off(value, expected) < STEPPED


def test_three_adamw_steps(case, tmp_path):
    family, dtype = case
    both = pair(tmp_path, family, dtype, ["linear_proj", "linear_fc2"])
    before = [mine.clone() for mine, _ in both.values()]
    both.train(3)
    for old, (mine, expected) in zip(before, both.values(), strict=True):
        assert off(mine, old) > 0.05
        assert off(mine, expected) < STEPPED
