"""Hugging Face adapters: one rank for all, what the file's size tells, what a configuration says."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.adapter_exports import CASES, trained

from steps.artifacts.checkpoint import damage_safetensors
from steps.engine.adapters.base import create
from steps.engine.checkpoint import hf_adapter
from steps.engine.checkpoint.hf_adapter import Update, uniform
from steps.engine.checkpoint.hf_to_lora import convert
from steps.engine.checkpoint.lazy import lazy
from steps.engine.checkpoint.lora_to_hf import export
from steps.engine.checkpoint.merge import open_adapter
from steps.errors import ArtifactError
from steps.shapes.hf_adapter_config import read
from steps.shapes.run_config import model_config
from steps.shapes.targets import covering, hf_name, linear_names, matches


def pair(rank, scale=1.5, magnitude=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 6, generator=generator), torch.randn(8, rank, generator=generator)
    return Update(a.to(dtype), b.to(dtype), scale, magnitude)


def dense(update):
    return update.scale * (update.b.double() @ update.a.double())


def test_updates_of_one_rank_and_scale_stay_as_they_are():
    updates = {"x": pair(3), "y": pair(3)}
    assert uniform(updates) == updates


def test_ranks_are_padded_and_the_scale_stays_where_it_is_one():
    updates = {"x": pair(3), "y": pair(5), "z": pair(0)}
    found = uniform(updates)
    assert {(update.rank, update.scale) for update in found.values()} == {(5, 1.5)}
    assert all(torch.equal(dense(found[name]), dense(update)) for name, update in updates.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_that_differ_are_folded_into_b(dtype):
    magnitude = torch.rand(8)
    updates = {"x": pair(3, 0.3, magnitude, dtype), "y": pair(2, 7 / 3, magnitude, dtype)}
    found = uniform(updates)
    assert {(update.rank, update.scale, update.b.dtype) for update in found.values()} == {(3, 1.0, torch.float32)}
    for name, update in updates.items():
        # One rounding of B to float32.
        torch.testing.assert_close(dense(found[name]), dense(update), rtol=1e-6, atol=1e-6)
        assert torch.equal(found[name].magnitude, magnitude)


def test_a_method_of_many_ranks_is_exported_as_plain_lora_of_one(tmp_path):
    """As AdaLoRA leaves them: another rank in every linear, one of them empty; vLLM ignores rank_pattern."""
    trained(tmp_path, "llama", CASES["lora"])
    adapter = open_adapter(tmp_path / "lora")
    model = model_config(adapter.checkpoint.run_config, "")
    method = create(adapter.section, model)
    ranks = {name: index % 4 for index, name in enumerate(adapter.linears)}

    def factors(name, tensors, shared):
        (whole,) = method.factors(name, tensors, shared).values()
        rank = ranks[name]
        return {"": replace(whole, a=whole.a[:rank], b=whole.b[:, :rank], scale=6 / max(rank, 1))}

    found = export(adapter, factors, model, None)
    assert found.config["r"] == found.config["lora_alpha"] == 3
    assert found.config["rank_pattern"] == found.config["alpha_pattern"] == {}
    assert len(found.updates) == 7 * model.num_layers
    for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
        linear = f"decoder.layers.1.{name}"
        tensors = {key: tensor.load() for key, tensor in adapter.linears[linear].items()}
        expected = factors(linear, tensors, {})[""]
        torch.testing.assert_close(dense(found.updates[hf_name(linear)]), dense(expected), rtol=1e-6, atol=1e-6)


def test_pruned_triplets_do_not_raise_the_rank(tmp_path):
    """AdaLoRA's factors hold all of them; a server that caps the rank is to see what is left."""
    case = {"type": "adalora", "dim": 5, "target_r": 2}
    adapters = trained(tmp_path, "llama", case).adapters
    with torch.no_grad():
        for index, module in enumerate(adapters.modules.values()):
            module.singular_values[[0, 2, 4] if index % 2 else [1, 3]] = 0
    adapter = open_adapter(tmp_path / "lora")
    linears = {name: {key: lazy(value) for key, value in one.saved().items()} for name, one in adapters.modules.items()}
    found = export(replace(adapter, linears=linears), adapters.method.factors, adapters.method.model, None)
    assert found.config["r"] == 3
    for name, module in adapters.modules.items():
        if name.endswith(("linear_proj", "linear_fc2")):
            whole = adapters.method.factors(name, module.saved(), {})[""]
            torch.testing.assert_close(dense(found.updates[hf_name(name)]), dense(whole), rtol=1e-6, atol=1e-6)


def test_float32_magnitudes_beside_bfloat16_factors_are_imported_to_the_bit(tmp_path):
    adapters = trained(tmp_path, "llama", CASES["dora"]).adapters
    exported = export(open_adapter(tmp_path / "lora"), adapters.method.factors, adapters.method.model, None)
    mixed = {name: replace(one, a=one.a.bfloat16(), b=one.b.bfloat16()) for name, one in exported.updates.items()}
    found = convert(replace(exported, updates=mixed), adapters.method.model, None, "mixed").tensors
    for name, module in adapters.modules.items():
        assert torch.equal(found[f"{name}.adapter.weight_magnitude"], module.weight_magnitude)


def dtypes(adapter):
    return {tensor.dtype for tensor in adapter.tensors().values()}


def test_bfloat16_stays_where_it_holds_every_value(tmp_path):
    trained(tmp_path, "llama", CASES["lora-bf16"])
    adapter = open_adapter(tmp_path / "lora")
    model = model_config(adapter.checkpoint.run_config, "")
    method = create(adapter.section, model)
    assert {tensor.dtype for tensor in export(adapter, method.factors, model, None).tensors().values()} == {
        torch.bfloat16
    }

    def finer(name, tensors, shared):
        return {part: replace(one, a=one.a / 3) for part, one in method.factors(name, tensors, shared).items()}

    assert dtypes(export(adapter, finer, model, None)) == {torch.float32}


def test_names_and_the_shortest_targets_that_mean_them():
    names = linear_names(3, canonical=True)
    assert hf_name("decoder.layers.2.mlp.linear_fc1_gate") == "model.layers.2.mlp.gate_proj"
    assert all(matches(hf_name(name), name) for name in names)
    assert covering(names, 3) == [
        "linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_gate", "linear_fc1_up", "linear_fc2",
    ]  # fmt: skip
    some = [name for name in names if "layers.1" not in name]
    assert covering(some, 3) == some
    assert covering(some[:1], 1) == ["linear_q"]


def test_the_size_of_a_file_is_held_against_its_header(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.ones(3, 5), "y": torch.ones(2)}, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    assert damage_safetensors(file) == ""
    file.write_bytes(whole[:-1])
    assert damage_safetensors(file) == f"{file.name} has {len(whole) - 1} bytes, its header promises {len(whole)}"
    file.write_bytes(whole + b"\0")
    assert "its header promises" in damage_safetensors(file)
    for short in (0, 5, 8, 20):
        file.write_bytes(whole[:short])
        assert damage_safetensors(file) == f"{file.name} ends within its header"
    for header in (b"[1, 2]", b"{nothing", b'{"x": {}}', b'{"x": {"data_offsets": []}}'):
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert damage_safetensors(file).startswith(f"the header of {file.name} cannot be read")


def test_patterns_mean_the_end_of_a_name_as_in_peft():
    said = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 4, "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 16}, "alpha_pattern": {r"layers\.\d\..*_proj": 6},
    }  # fmt: skip
    config = read(said, "")
    assert config.rank("model.layers.3.self_attn.q_proj") == 2
    assert config.rank("model.layers.3.self_attn.my_q_proj") == 8
    assert config.rank("model.layers.1.mlp.up_proj") == 16
    assert config.rank("model.layers.11.mlp.up_proj") == 8
    assert config.scale("model.layers.1.mlp.up_proj") == 6 / 4
    assert config.scale("lm_head") == 4 / 8**0.5


def test_a_magnitude_under_the_name_of_early_releases_is_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True})
    )
    name = "base_model.model.model.layers.0.mlp.up_proj."
    tensors = {"lora_A.weight": torch.ones(2, 6), "lora_B.weight": torch.ones(8, 2)}
    tensors["lora_magnitude_vector.weight"] = torch.ones(8)
    save_file({name + key: value for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (update,) = hf_adapter.read(tmp_path).updates.values()
    assert update.magnitude is not None
    assert update.scale == 2


def test_an_empty_adapter_is_damage(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="holds no tensors") as caught:
        hf_adapter.read(tmp_path)
    assert caught.value.name == "damaged_artifact"
