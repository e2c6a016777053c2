"""The account against what others count: transformers' models, peft's adapters, bitsandbytes' quantized weights."""

from __future__ import annotations

import pytest
import torch

from steps.config.peft import Quantization, section_class
from steps.shapes.account import Account, trainable
from steps.shapes.hf_config import config_json
from steps.shapes.memory import held
from steps.shapes.model_config import ModelConfig
from steps.shapes.presets import preset, presets

transformers = pytest.importorskip("transformers")
HF = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def on_meta(model: ModelConfig):
    """The model in transformers, without memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config_json(model)))


@pytest.mark.parametrize("name", presets())
def test_transformers_builds_as_many_parameters(name):
    assert sum(value.numel() for value in on_meta(preset(name)).parameters()) == preset(name).parameters


@pytest.mark.parametrize(("name", "kind"), [("7B", "LlamaConfig"), ("mistral-7b", "MistralConfig")])
def test_shapes_that_transformers_ships_as_its_defaults(name, kind):
    theirs, model = getattr(transformers, kind)(), preset(name)
    assert (theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers) == (
        model.vocab_size, model.hidden_size, model.ffn_hidden_size, model.num_layers,
    )  # fmt: skip
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (
        model.num_attention_heads,
        model.num_query_groups,
    )


@pytest.mark.parametrize("name", ["7B", "llama-3-8b", "qwen3-0.6b", "smollm2-135m"])
@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), HF], ids=" ".join)
def test_peft_counts_as_many_trained_and_all(name, modules):
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        wrapped = peft.get_peft_model(on_meta(preset(name)), peft.LoraConfig(r=16, target_modules=list(modules)))
    section = section_class("canonical_lora")(dim=16, target_modules=list(modules))
    total = Account.of(section, preset(name)).total
    assert wrapped.get_nb_trainable_parameters() == (total.trainable, total.parameters + total.trainable)


def test_peft_counts_as_many_with_magnitudes():
    """DoRA on a layer's unfused linears: r (out + in) + out of each, by the section's own formula."""
    peft = pytest.importorskip("peft")
    # Magnitudes are norms of weights, which a meta device does not have: a small model.
    model = ModelConfig("llama", 2, 32, 4, 2, 8, 48, 61, 64)
    real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config_json(model)))
    wrapped = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=list(HF), use_dora=True))
    section = section_class("dora")(dim=4)
    canonical = section_class("canonical_lora")(dim=4)
    magnitudes = sum(
        kind.count * (section.trainable(*kind.shape) - canonical.trainable(*kind.shape))
        for kind in Account.of(canonical, model).kinds
        if kind.is_linear
    )
    assert wrapped.get_nb_trainable_parameters()[0] == trainable(canonical, model) + magnitudes


def test_the_arithmetic_on_bert_in_the_documents():
    """docs/peft-methods.md: klue/bert-base, BERT's usual shape with 32,000 tokens, and a head of two classes."""
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32000, num_labels=2))
        before = sum(value.numel() for value in bert.parameters())
        settings = peft.LoraConfig(r=8, target_modules=["query", "value", "key", "dense"], task_type="SEQ_CLS")
        trained, everything = peft.get_peft_model(bert, settings).get_nb_trainable_parameters()
    assert (before, trained, f"{100 * trained / everything:.2f}") == (110_618_882, 1_340_930, "1.20")


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_holds_as_many_bytes(double_quant, block_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    # Not every matrix is a whole number of blocks, nor of blocks of scales.
    model = ModelConfig("llama", 2, 40, 5, 5, 8, 123, 61, 64)
    weights = scales = 0
    for name in ((model.qkv_size, 40), (40, 40), (2 * 123, 40), (40, 123)):
        packed, state = functional.quantize_4bit(
            torch.randn(name), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
        )
        weights += model.num_layers * packed.nbytes
        inner = (state.state2.absmax.nbytes + state.offset.nbytes) if double_quant else 0
        scales += model.num_layers * (state.absmax.nbytes + inner)
    settings = Quantization(type="nf4", double_quant=double_quant, block_size=block_size)
    rows = {row.what: row.nbytes for row in held(section_class("lora")(dim=2, quantization=settings), model, "float32")}
    assert (rows["weights of linears"], rows["scales of linears"]) == (weights, scales)
