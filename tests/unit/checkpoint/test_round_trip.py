"""HF to Megatron and back: the same bits, the same config, for every family, sharded or not, in every dtype."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import FAMILIES, save_hf

from steps.engine.checkpoint.convert import described_by, hf_to_megatron, megatron_source, to_hf_directory
from steps.engine.checkpoint.fingerprint import fingerprint
from steps.engine.checkpoint.hf import open_source
from steps.errors import ArtifactError
from steps.shapes import hf_config

pytest.importorskip("transformers", reason="extra parity")


def stored(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same(left, right):
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bit_equal(name, shard, dtype, tmp_path):
    save_hf(tmp_path / "hf", name, dtype=dtype, max_shard_size=shard)
    source = open_source(str(tmp_path / "hf"))
    there = hf_to_megatron(source, tmp_path / "megatron")
    shard_bytes = 40_000 if shard == "40KB" else 5_000_000_000
    back = to_hf_directory(megatron_source(tmp_path / "megatron"), tmp_path / "back", shard_bytes=shard_bytes)
    assert same(stored(tmp_path / "hf"), stored(tmp_path / "back"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
    assert there.fingerprint == back.fingerprint == fingerprint(source.tensors)
    assert there.parameters == sum(tensor.numel() for tensor in stored(tmp_path / "hf").values())
    sharded = (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert sharded == (shard == "40KB") == (len(list((tmp_path / "back").glob("*.safetensors"))) > 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_was_written_with_a_config_made_anew(name, tmp_path):
    """The way of a checkpoint that keeps no config.json: everything comes from run_config.yaml."""
    from transformers import AutoModelForCausalLM

    model = save_hf(tmp_path / "hf", name)
    source = open_source(str(tmp_path / "hf"))
    hf_to_megatron(source, tmp_path / "megatron")
    (tmp_path / "megatron" / "iter_0000000" / "hf" / "config.json").unlink()
    to_hf_directory(megatron_source(tmp_path / "megatron"), tmp_path / "back")
    loaded, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(50)[None] % model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert open_source(str(tmp_path / "back")).config == source.config


def test_casting_changes_weights_and_what_config_json_says_of_them(tmp_path):
    save_hf(tmp_path / "hf", "qwen3", dtype=torch.float32)
    source = open_source(str(tmp_path / "hf")).cast("bfloat16")
    hf_to_megatron(source, tmp_path / "megatron")
    to_hf_directory(megatron_source(tmp_path / "megatron"), tmp_path / "back")
    expected = {name: tensor.bfloat16() for name, tensor in stored(tmp_path / "hf").items()}
    assert same(expected, stored(tmp_path / "back"))
    assert hf_config.stated_dtype(json.loads((tmp_path / "back" / "config.json").read_text())) == "bfloat16"
    assert megatron_source(tmp_path / "megatron").config.params_dtype == "bfloat16"


def test_config_and_tokenizer_of_another_model_are_taken_only_if_it_has_the_same_shape(tmp_path):
    save_hf(tmp_path / "hf", "llama")
    save_hf(tmp_path / "twin", "llama", seed=5)
    save_hf(tmp_path / "other", "llama", intermediate_size=128)
    hf_to_megatron(open_source(str(tmp_path / "hf")), tmp_path / "megatron")
    source = megatron_source(tmp_path / "megatron")
    described, path = described_by(source, str(tmp_path / "twin"))
    assert path == tmp_path / "twin"
    assert described.files["config.json"] == (tmp_path / "twin" / "config.json").read_text()
    with pytest.raises(ArtifactError, match="ffn_hidden_size 128 instead of 96") as caught:
        described_by(source, str(tmp_path / "other"))
    assert caught.value.name == "base_model_mismatch"


def test_a_stored_copy_of_a_tied_output_layer_is_dropped_and_a_different_one_refused(tmp_path):
    from safetensors.torch import save_file

    save_hf(tmp_path / "hf", "llama_tied")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    before = fingerprint(open_source(str(tmp_path / "hf")).tensors)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, file, metadata={"format": "pt"})
    assert fingerprint(open_source(str(tmp_path / "hf")).tensors) == before
    copy[0, 0] += 1
    save_file({**tensors, "lm_head.weight": copy}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs"):
        open_source(str(tmp_path / "hf"))
