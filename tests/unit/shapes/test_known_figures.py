"""Figures that are known: published totals of models, counts and bytes of adapters on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steps.config.peft import Quantization, names, section_class
from steps.shapes.account import Account, trainable
from steps.shapes.presets import preset, presets
from steps.shapes.targets import shape

PAGE = Path(__file__).parents[3] / "docs/peft-methods.md"
TOTALS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
}
SIZES = {"7B": "llama-2-7b", "13B": "llama-2-13b", "70B": "llama-2-70b"}
UNFUSED = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_every_preset_has_its_published_total():
    assert {name: preset(name).parameters for name in TOTALS} == TOTALS
    assert set(presets()) == {*TOTALS, *(size.lower() for size in SIZES)}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_llama_2s_in_any_case(size):
    assert preset(size) is preset(size.lower()) is preset(SIZES[size].upper())


@pytest.mark.parametrize(
    ("model", "method", "settings", "expected", "share"),
    [
        ("7B", "canonical_lora", {"dim": 16, "target_modules": ["q_proj", "v_proj"]}, 8_388_608, "0.1243"),
        ("7B", "canonical_lora", {"dim": 8, "target_modules": ["q_proj", "v_proj"]}, 4_194_304, "0.0622"),
        ("7B", "canonical_lora", {"dim": 16, "target_modules": ATTENTION}, 16_777_216, "0.2484"),
        ("7B", "canonical_lora", {"dim": 16}, 39_976_960, "0.5898"),
        ("7B", "lora", {"dim": 16}, 33_685_504, "0.4974"),
        ("7B", "lora", {"dim": 32, "target_modules": ["linear_qkv", "linear_proj"]}, 25_165_824, "0.3721"),
        ("7B", "canonical_lora", {"dim": 32, "target_modules": UNFUSED}, 56_098_816, "0.8256"),
        ("llama-3-8b", "canonical_lora", {"dim": 16, "target_modules": ATTENTION}, 13_631_488, "0.1695"),
        ("mistral-7b", "canonical_lora", {"dim": 16, "target_modules": ATTENTION}, 13_631_488, "0.1879"),
        ("llama-3-8b", "canonical_lora", {"dim": 16}, 41_943_040, "0.5196"),
        ("llama-3-8b", "lora", {"dim": 16}, 35_651_584, "0.4420"),
    ],
)  # fmt: skip
def test_what_adapters_on_known_models_come_to(model, method, settings, expected, share):
    section = section_class(method)(**settings)
    total = Account.of(section, preset(model)).total
    assert total.trainable == trainable(section, preset(model)) == expected
    assert f"{100 * total.share:.4f}" == share


def test_a_square_matrix():
    assert section_class("lora")(dim=8).trainable(768, 768) == 12_288
    assert round(100 * (1 - 12_288 / 768**2), 2) == 97.92


def test_dora_on_unfused_linears():
    """As Hugging Face's modules have it; ours sits on the fused ones and has no such number."""
    section, model = section_class("dora")(dim=32), preset("7B")
    parts = ("linear_q", "linear_k", "linear_v", "linear_fc1_up", "linear_fc2")
    assert model.num_layers * sum(section.trainable(*shape(model, part)) for part in parts) == 56_975_360


@pytest.mark.parametrize(
    ("size", "linears", "tables", "everything", "bfloat16"),
    [
        ("7B", "3.34", "0.52", "4.35", "13.5"),
        ("13B", "6.55", "0.66", "7.95", "26.0"),
        ("70B", "35.31", "1.05", "38.85", "138"),
    ],
)
def test_memory_of_qlora(size, linears, tables, everything, bfloat16):
    """r 16 on all linear modules; the figures are for a bfloat16 adapter with its gradients and float32 moments."""
    model = preset(size)
    section = section_class("canonical_lora")(dim=16, quantization=Quantization(type="nf4"))
    rows = Account.of(section, model, "bfloat16").memory
    base = {row.what: row.nbytes for row in rows[:4]}
    assert f"{(base['weights of linears'] + base['scales of linears']) / 1e9:.2f}" == linears
    assert f"{base['embedding, output layer'] / 1e9:.2f}" == tables
    adapter = trainable(section, model) * (2 + 2 + 2 * 4)
    assert f"{(sum(base.values()) + adapter) / 1e9:.2f}" == everything
    plain = Account.of(section_class("lora")(dim=16), model, "bfloat16").memory[:3]
    assert [row.what for row in plain] == ["weights of linears", "embedding, output layer", "norms, biases"]
    assert f"{sum(row.nbytes for row in plain) / 1e9:.{1 if size != '70B' else 0}f}" == bfloat16


@pytest.mark.parametrize(("double_quant", "bits"), [(False, "0.500"), (True, "0.127")])
def test_what_scales_cost_for_each_value(double_quant, bits):
    settings = Quantization(double_quant=double_quant)
    rows = Account.of(section_class("lora")(quantization=settings), preset("7B"), "bfloat16").memory
    weights, scales = (
        sum(row.nbytes for row in rows if row.what.startswith(what)) for what in ("weights of", "scales")
    )
    assert f"{8 * scales / (2 * weights):.3f}" == bits


def test_the_page_for_users_has_every_method_and_the_numbers_of_this_file():
    """The tables are made by docs/generate.py, which `make check` holds the page to."""
    page = PAGE.read_text()
    assert set(names()) <= set(re.findall(r"^## (\w+)$", page, flags=re.M))
    for number in (8_388_608, 16_777_216, 39_976_960, 33_685_504, 25_165_824, 56_098_816, 56_975_360, 13_631_488):
        assert f"{number:,}" in page
