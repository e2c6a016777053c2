"""The account of parameters and memory, held against a real decoder with real adapters and a real optimizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.adapters import CASES, adapted, section, told
from support.packed import SHAPE, random_decoder

from steps.config.peft import section_class
from steps.config.training import Optimizer
from steps.engine.train.optim import AdamW, Gradients
from steps.shapes import targets
from steps.shapes.account import Account, trainable
from steps.shapes.model_config import ModelConfig

every_case = pytest.mark.parametrize("case", CASES, ids=told)
FEATURES = {
    "plain": SHAPE,
    "biases (Qwen2)": replace(SHAPE, family="qwen2", add_qkv_bias=True),
    "norms of q and k, wide heads (Qwen3)": replace(SHAPE, family="qwen3", qk_layernorm=True, kv_channels=24),
    "tied": replace(SHAPE, share_embeddings_and_output_weights=True),
}


def held(account: Account) -> dict[str, int]:
    """Bytes by what they are for."""
    found: dict[str, int] = {}
    for row in account.memory:
        found[row.what] = found.get(row.what, 0) + row.nbytes
    return found


@every_case
def test_parameters_by_kind_are_the_decoders_and_the_adapters(case):
    adapters, settings = adapted(case), section(case)
    account = Account.of(settings, SHAPE)
    trained: dict[str, int] = dict.fromkeys((kind.name for kind in account.kinds), 0)
    for name, module in adapters.modules.items():
        for key, value in module.named_parameters():
            trained[_kind(name, key, settings.canonical)] += value.numel()
    if adapters.shared is not None:
        trained["shared"] = sum(value.numel() for value in adapters.shared.parameters())
    assert {kind.name: kind.trainable for kind in account.kinds} == trained
    assert account.total.trainable == trainable(settings, SHAPE) == sum(trained.values())
    assert account.total.parameters == SHAPE.parameters


def _kind(linear: str, key: str, canonical: bool) -> str:
    """The kind that a parameter of an adapter is counted under: the part of a fused linear, for canonical methods."""
    last = linear.rpartition(".")[2]
    part = key.partition(".")[0].removeprefix("adapter_")
    if not canonical or last not in targets.PARTS:
        return last
    return next(name for name in targets.PARTS[last] if name.endswith(f"_{part}"))


@pytest.mark.parametrize("shape", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("canonical", [False, True])
def test_parameters_of_the_base_by_kind(shape, canonical):
    settings = section_class("canonical_lora" if canonical else "lora")(dim=2)
    decoder = random_decoder(shape)
    account = Account.of(settings, shape)
    assert account.total.parameters == shape.parameters == sum(value.numel() for value in decoder.parameters())
    counted: dict[str, int] = {}
    for name, value in decoder.named_parameters():
        kind = "norms" if "norm" in name else "biases" if name.endswith("bias") else name.split(".")[-2]
        counted[kind.replace("word_embeddings", "embedding")] = (
            counted.get(kind.replace("word_embeddings", "embedding"), 0) + value.numel()
        )
    parts = {part: fused for fused, names in targets.PARTS.items() for part in names}
    told: dict[str, int] = {}
    for kind in account.kinds:
        name = parts.get(kind.name, kind.name)
        told[name] = told.get(name, 0) + kind.parameters
    assert told == counted
    norms = [name for name, _ in decoder.named_parameters() if "norm" in name]
    assert next(kind.count for kind in account.kinds if kind.name == "norms") == len(norms)


@every_case
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors_that_a_run_holds(case, precision):
    adapters, settings = adapted(case, dtype=getattr(torch, precision)), section(case)
    linears = adapters.decoder.linears()
    rest = {
        name: value
        for name, value in adapters.decoder.named_parameters()
        if "adapter" not in name.split(".") and name.removesuffix(".weight") not in linears
    }
    parameters = adapters.parameters()
    gradients, optimizer = Gradients(parameters), AdamW(adapters, Optimizer())
    for value in gradients.buffers:
        value.fill_(1.0)
    optimizer.step(1e-3)
    moments = [value for state in optimizer.state().values() for key, value in state.items() if key != "step"]
    untrained = sum(buffer.nbytes for module in adapters.modules.values() for buffer in module.buffers())

    found = held(Account.of(settings, SHAPE, precision))
    weights = found.pop("weights of linears") + found.pop("scales of linears", 0)
    assert weights == sum(linear.weight.nbytes for linear in linears.values())
    tables = [name for name in rest if "word_embeddings" in name or "output_layer" in name]
    assert found.pop("embedding, output layer") == sum(rest.pop(name).nbytes for name in tables)
    assert found.pop("norms, biases") == sum(value.nbytes for value in rest.values())
    assert found.pop("adapter") == sum(value.nbytes for value in parameters.values())
    assert found.pop("gradients") == sum(buffer.nbytes for buffer in gradients.buffers)
    assert found.pop("moments of Adam") == sum(value.nbytes for value in moments)
    assert found.pop("untrained tensors of the adapter", 0) == untrained
    assert not found


@pytest.mark.parametrize("method", ["lora", "dora", "canonical_lora"])
def test_a_bfloat16_adapter_halves_all_of_its_own_but_magnitudes(method):
    case = {"type": method, "dim": 4, "lora_dtype": "bfloat16"}
    adapters = adapted(case, dtype=torch.bfloat16)
    parameters = adapters.parameters()
    gradients, optimizer = Gradients(parameters), AdamW(adapters, Optimizer())
    optimizer.step(1e-3)
    moments = [value for state in optimizer.state().values() for key, value in state.items() if key != "step"]
    found = held(Account.of(section(case), SHAPE, "bfloat16"))
    assert found["adapter"] == sum(value.nbytes for value in parameters.values())
    assert found["gradients"] == sum(buffer.nbytes for buffer in gradients.buffers)
    assert found["moments of Adam"] == sum(value.nbytes for value in moments)
    whole = held(Account.of(section({**case, "lora_dtype": None}), SHAPE, "bfloat16"))["adapter"]
    magnitudes = sum(value.nbytes for name, value in parameters.items() if name.endswith("weight_magnitude"))
    assert found["adapter"] == (whole + magnitudes) / 2


@pytest.mark.parametrize(
    ("stored", "precision", "expected"),
    [
        ("bfloat16", "auto", "bfloat16"), ("float16", "auto", "float32"), ("float32", "auto", "float32"),
        ("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"),
    ],
)  # fmt: skip
def test_the_base_is_counted_in_the_dtype_it_is_computed_in(stored, precision, expected):
    account = Account.of(section_class("lora")(dim=2), replace(SHAPE, params_dtype=stored), precision)
    assert account.memory[0].dtype == expected
    warned = any("slow at bfloat16" in note for note in account.notes)
    assert warned == (precision == "auto" and stored == "bfloat16")


def test_layers_that_are_left_out_are_not_counted():
    settings = section_class("lora")(dim=2, target_modules=["*.layers.1.*.linear_qkv", "linear_fc2"])
    kinds = {kind.name: (kind.adapted, kind.count) for kind in Account.of(settings, SHAPE).kinds}
    assert kinds["linear_qkv"] == (1, 2)
    assert kinds["linear_fc2"] == (2, 2)
    assert kinds["linear_proj"] == (0, 2)


def test_shares_are_of_all_parameters_the_adapters_included():
    shape = ModelConfig("llama", 1, 8, 1, 1, 8, 8, 8, 8)
    account = Account.of(section_class("lora")(dim=1, target_modules=["linear_proj"]), shape)
    proj = next(kind for kind in account.kinds if kind.name == "linear_proj")
    assert (proj.parameters, proj.trainable, proj.share) == (64, 16, 16 / 80)
    assert account.total.share == 16 / (shape.parameters + 16)
