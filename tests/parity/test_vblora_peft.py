"""VB-LoRA against Hugging Face peft: the same weights, the same numbers."""

from __future__ import annotations

import pytest
import torch
from support.peft_stacks import LlamaPair, Pair, loss, off, shaken

from steps.config.peft.vblora import VBLoRA
from steps.engine.adapters.vblora import joined

peft = pytest.importorskip("peft")

# Rounding of sums of up to 64 terms through three layers; float32 has 1.2e-7 for each operation, float64 2.2e-16.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
BANK = {"num_vectors": 30, "vector_length": 16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_topk = pytest.mark.parametrize("topk", [2, 3])


def pair(dtype: torch.dtype, topk: int = 2, **options) -> Pair:
    settings = peft.VBLoRAConfig(
        r=4, topk=topk, target_modules=["first", "second", "third"], save_only_topk_weights=True, **BANK
    )
    made = Pair(VBLoRA(dim=4, topk=topk, **BANK), settings, dtype, **options)
    alike(made)
    return made


def alike(made: Pair | LlamaPair) -> None:
    """The same random bank and logits on both sides."""
    generator = torch.Generator().manual_seed(1)
    for value, other in parameters(made):
        value.data.copy_(shaken(value.shape, generator))
        other.data.copy_(value.data)


def parameters(made: Pair | LlamaPair):
    yield made.adapters.shared.vector_bank, made.model.base_model.vblora_vector_bank["default"]
    for mine, theirs in made.layers():
        yield mine.linear_in.logits, theirs.vblora_logits_A["default"]
        yield mine.linear_out.logits, theirs.vblora_logits_B["default"]


@every_topk
@every_dtype
def test_forward_and_gradients(dtype, topk):
    made = pair(dtype, topk)
    ours, theirs = (made.x.clone().requires_grad_() for _ in range(2))
    out, expected = made.decoder(ours), made.model.base_model(theirs, made.target)
    assert off(out, expected.out) < DTYPES[dtype]
    loss(out, made.target).backward()
    expected.loss.backward()
    assert off(ours.grad, theirs.grad) < DTYPES[dtype]
    for value, other in parameters(made):
        assert value.grad.abs().sum() > 0
        assert off(value.grad, other.grad) < DTYPES[dtype]


@every_dtype
def test_three_optimizer_steps(dtype):
    """As the method groups its parameters: the logits ten times as fast as the bank."""
    made = pair(dtype)
    rate, groups = 1e-2, {1.0: [], 10.0: []}
    for name, value in made.adapters.parameters().items():
        groups[made.adapters.method.group(name, value).lr_mult].append(value)
    optimizer = torch.optim.AdamW(
        [{"params": values, "lr": rate * factor} for factor, values in groups.items()], weight_decay=0.0
    )
    bank = made.model.base_model.vblora_vector_bank["default"]
    logits = [value for name, value in made.model.named_parameters() if "vblora_logits" in name]
    reference = torch.optim.AdamW([{"params": [bank], "lr": rate}, {"params": logits, "lr": 10 * rate}], weight_decay=0)
    before = [value.detach().clone() for value, _ in parameters(made)]
    chosen = [value.topk(2).indices for value, _ in parameters(made)][1:]
    for _ in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        loss(made.decoder(made.x), made.target).backward()
        made.model.base_model(made.x, made.target).loss.backward()
        optimizer.step()
        reference.step()
    for (value, other), start in zip(parameters(made), before, strict=True):
        assert off(value, start) > 1e-2
        # Adam divides each gradient by its own size: the smallest ones carry more rounding than the whole tensor's.
        assert off(value, other) < 10 * DTYPES[dtype]
    now = [value.topk(2).indices for value, _ in parameters(made)][1:]
    assert any(not torch.equal(one, other) for one, other in zip(chosen, now, strict=True)), "no choice changed"


@every_topk
def test_merged_weights_of_a_bfloat16_base_are_bitwise_the_same(topk):
    """Factors in float32 and one product of them on both sides; the sum with the weight is rounded once."""
    made = pair(torch.bfloat16, topk, adapter_dtype=torch.float32)
    shared = made.adapters.shared.state_dict()
    mine = {}
    for name, linear in made.decoder.linears().items():
        saved = made.adapters.modules[name].saved()
        mine[name] = made.adapters.method.merge(name, linear.weight.float(), saved, shared).to(torch.bfloat16)
        assert not torch.equal(mine[name], linear.weight)
    theirs = made.model.merge_and_unload()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs.get_submodule(name).weight)


@every_topk
def test_what_is_saved_is_what_peft_saves(topk):
    """The same indices; of the weights peft saves the softmax, we the logits less the largest, from which it comes."""
    made = pair(torch.float32, topk)
    theirs = peft.get_peft_model_state_dict(made.model)
    size = sum(tensor.numel() for tensor in theirs.values())
    mine = {name: tensor for name, tensor in made.adapters.tensors().items() if name != "adapter.vector_bank"}
    for name in made.adapters.modules:
        for side, letter in (("linear_in", "A"), ("linear_out", "B")):
            prefix = f"base_model.model.{name}.vblora_logits_{letter}"
            assert torch.equal(mine[f"{name}.adapter.{side}.indices"], theirs[f"{prefix}_topk_indices"])
            rest = mine[f"{name}.adapter.{side}.logits"]
            weights = torch.cat((torch.zeros_like(rest[..., :1]), rest), -1).softmax(-1)
            # Each weight is rounded once or twice on its way.
            torch.testing.assert_close(weights[..., :-1], theirs[f"{prefix}_topk_weights"], rtol=1e-6, atol=0)
    section = made.adapters.method.section
    shapes = [(linear.out_features, linear.in_features) for linear in made.decoder.linears().values()]
    assert section.shared_trainable() + sum(section.stored(*shape) for shape in shapes) == size
    assert sum(tensor.numel() for tensor in mine.values()) + section.shared_trainable() == size


@every_topk
def test_factors_of_the_saved_tensors_are_those_of_the_forward_to_the_bit(topk):
    made = pair(torch.float32, topk)
    for name, module in made.adapters.modules.items():
        bank = made.adapters.shared.vector_bank
        a, b = joined(module.linear_in(bank), module.linear_out(bank))
        (factors,) = made.adapters.method.factors(name, module.saved(), made.adapters.shared.state_dict()).values()
        assert torch.equal(factors.a, a)
        assert torch.equal(factors.b, b)
        assert factors.scale == 1


@every_dtype
def test_logits_of_a_llama(dtype, tmp_path):
    section = VBLoRA(target_modules=["linear_proj", "linear_fc2"], dim=4, **BANK)
    settings = peft.VBLoRAConfig(r=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM", **BANK)
    made = LlamaPair(tmp_path, section, settings, dtype)
    alike(made)
    mine, theirs = made.logits()
    # In float64 only what transformers always does in float32 (norms, rotation, softmax) makes a difference.
    torch.testing.assert_close(mine, theirs, rtol=0, atol={torch.float64: 2e-6, torch.float32: 2e-4}[dtype])
