"""convert/hf_to_lora: there and back to the bit, peft's own adapters merged, refusals by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_exports import CASES, ids, trained, write_base
from support.run_step import run_step

from steps.artifacts.opening import open_artifact
from steps.config import yaml12
from steps.engine.checkpoint.merge import open_adapter

transformers = pytest.importorskip("transformers", reason="extra parity")
peft = pytest.importorskip("peft", reason="extra parity")

FAMILY = "qwen2"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def to_lora(cwd, **changes):
    config = {"hf_adapter_path": "theirs", "base_megatron_path": "base", "lora_checkpoint": "again"}
    return run_step("convert/hf_to_lora", config | changes, cwd)


def to_hf(cwd, lora, out):
    base = {"base_hf_path": "source", "base_megatron_path": "base"}
    done = run_step("convert/lora_to_hf", {"lora_checkpoint": lora, "output_hf_path": out, **base}, cwd)
    assert done.returncode == 0, done.stderr


def merge(cwd, lora):
    base = {"base_megatron_path": "base", "base_hf_path": None}
    done = run_step("convert/merge_lora", {"lora_checkpoint": lora, "output_hf_path": "merged", **base}, cwd)
    assert done.returncode == 0, done.stderr
    return done


def facts(path):
    return json.loads((path / "artifact.json").read_text())["facts"]


def by_peft(root, **settings):
    """An adapter that peft made and saved at root/theirs for root/source, all its tensors moved; the model under it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "source", attn_implementation="eager")
    torch.manual_seed(4)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(root / "theirs")
    return model


@pytest.fixture
def theirs(tmp_path):
    """A model as `source` and `base`, an adapter of peft's for it as `theirs`."""
    write_base(tmp_path, FAMILY)
    by_peft(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", ["lora", "dora", "canonical-some", "rslora", "pissa"])
def test_exported_and_taken_over_and_exported_again_is_bit_equal(case, tmp_path):
    trained(tmp_path, FAMILY, CASES[case], tokenizer_digest="t" * 64)
    to_hf(tmp_path, "lora", "theirs")
    done = to_lora(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    to_hf(tmp_path, "again", "once_more")
    for name in FILES:
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "once_more" / name).read_bytes(), name
    told, first = facts(tmp_path / "again"), facts(tmp_path / "lora")
    assert told["base_fingerprint"] == first["base_fingerprint"]
    assert told["tokenizer_digest"] == first["tokenizer_digest"]
    assert told["method"] == first["method"]
    assert told["finished"] is True


def test_the_checkpoint_says_what_it_is_as_training_does(tmp_path):
    """run_config.yaml with Megatron-Bridge's peft section and ours, equal to that of the checkpoint it came from."""
    trained(tmp_path, FAMILY, CASES["lora"])
    to_hf(tmp_path, "lora", "theirs")
    assert to_lora(tmp_path).returncode == 0
    ours, first = (
        yaml12.load(tmp_path / name / iteration / "run_config.yaml")[0]
        for name, iteration in (("again", "iter_0000000"), ("lora", "iter_0000007"))
    )
    assert ours == first
    assert ours["peft"]["_target_"] == "megatron.bridge.peft.lora.LoRA"
    assert ours["adapter"]["type"] == "lora"
    assert open_artifact(str(tmp_path / "again"), "checkpoint_lora").record.digest


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 1}}],
    ids=["lora", "dora", "rslora with patterns"],
)
def test_what_peft_trained_merges_to_what_peft_merges(settings, tmp_path):
    write_base(tmp_path, FAMILY)
    model = by_peft(tmp_path, **settings)
    done = to_lora(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: nothing but shapes tells that" in done.stdout
    assert ("padded with zeros to rank 6, other scales folded into B" in done.stdout) == ("rank_pattern" in settings)
    assert ("laid out as blocks of one pair of rank 8" in done.stdout) == ("use_dora" in settings)
    merge(tmp_path, "again")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        # Float32: one product summed in another order; with DoRA a division by the norm, too.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    base = load_file(tmp_path / "source" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    adapted = {name for name in base if name.endswith(("q_proj.weight", "v_proj.weight"))}
    # The norm of a row of k, which DoRA on the whole linear_qkv is given as its magnitude, divides it to itself.
    assert changed == adapted


def test_the_merged_model_is_base_and_adapter_in_transformers(theirs):
    assert to_lora(theirs).returncode == 0
    merge(theirs, "again")
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(theirs / "source"), theirs / "theirs").eval()
    with torch.no_grad():
        merged, got = load(theirs / "merged").eval()(ids()[None]).logits, adapted(ids()[None]).logits
    # Float32, rounded once more in the merged weights; the logits are of order 10.
    torch.testing.assert_close(merged, got, rtol=0, atol=2e-4)
    assert open_adapter(theirs / "again").section["type"] == "canonical_lora"
    assert json.loads((theirs / "summary.json").read_text())["target_modules"] == ["linear_q", "linear_v"]


def change_config(root, **changes):
    path = root / "theirs" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(root, change):
    path = root / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, 'peft_type: "IA3" is not supported. Allowed: LORA'),
        ({"bias": "all"}, 'bias: "all" is not supported. Allowed: "none"'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save: ["lm_head"] is not supported'),
        ({"task_type": "SEQ_CLS"}, 'task_type: "SEQ_CLS" is not supported. Allowed: "CAUSAL_LM"'),
        ({"lora_bias": True}, "lora_bias: true is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: [[0, 2]] is not supported"),
        ({"a_new_trick": {"strength": 2}}, 'a_new_trick: {"strength": 2} is not supported'),
        ({"init_lora_weights": "pissa"}, "It moves the base's weights: save the adapter with peft's"),
        ({"r": 0}, "r: 0 is not supported. Allowed: a whole number from 1"),
        ({"lora_alpha": -1}, "lora_alpha: -1 is not supported. Allowed: a number above 0"),
        ({"rank_pattern": {"q_proj": "x"}}, 'rank_pattern.q_proj: "x" is not supported'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_result_is_refused_by_name(changes, told, theirs):
    change_config(theirs, **changes)
    done = to_lora(theirs)
    assert done.returncode == 4
    assert told in done.stderr
    assert "[unsupported_adapter]" in done.stderr
    assert "merge_and_unload" in done.stderr or "path_initial_model_for_weight_conversion" in done.stderr
    assert not (theirs / "again").exists()


def test_fields_that_change_nothing_are_let_through(theirs):
    harmless = {"lora_dropout": 0.1, "inference_mode": False, "a_new_trick": None, "another": [], "peft_version": "9.9"}
    change_config(theirs, **harmless, layers_to_transform=None, init_lora_weights="gaussian")
    assert to_lora(theirs).returncode == 0


def test_everything_wrong_is_told_at_once(theirs):
    change_config(theirs, bias="all", modules_to_save=["lm_head"], lora_alpha=0)
    told = to_lora(theirs).stderr
    assert all(f"adapter_config.json: {key}:" in told for key in ("bias", "modules_to_save", "lora_alpha"))


@pytest.mark.parametrize(
    ("change", "name", "told"),
    [
        (
            lambda tensors: tensors.update({name[17:]: tensors.pop(name) for name in list(tensors)}),
            "unsupported_adapter",
            "is no tensor of a LoRA on a linear. Allowed: base_model.model.<module>.{lora_A.weight",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(3)}),
            "unsupported_adapter",
            "base_model.model.lm_head.weight: is no tensor of a LoRA on a linear",
        ),
        (
            lambda tensors: tensors.update(
                {f"base_model.model.lm_head.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
            ),
            "unsupported_adapter",
            "it adapts lm_head, which no method here does. Allowed: q_proj",
        ),
        (
            lambda tensors: tensors.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"),
            "damaged_artifact",
            "model.layers.1.self_attn.v_proj: has no lora_B.weight",
        ),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.1.self_attn.v_proj.lora_magnitude_vector": torch.ones(32)}
            ),
            "damaged_artifact",
            "has a lora_magnitude_vector, but use_dora is false in adapter_config.json",
        ),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(5, 64)}
            ),
            "damaged_artifact",
            "lora_A.weight [5, 64] and lora_B.weight [64, 4] are not of rank 4, which adapter_config.json says",
        ),
    ],
    ids=["no prefix", "a whole weight", "lm_head", "half a pair", "a magnitude too many", "another rank"],
)
def test_tensors_that_mean_something_else_are_refused(change, name, told, theirs):
    change_tensors(theirs, change)
    done = to_lora(theirs)
    assert done.returncode == 4
    assert told in done.stderr
    assert f"[{name}]" in done.stderr
    assert not (theirs / "again").exists()


@pytest.mark.parametrize(
    "keep", [4, 100, -1, -5000], ids=["4 bytes", "half a header", "a byte less", "half the tensors"]
)
def test_a_truncated_file_is_damage(keep, theirs):
    file = theirs / "theirs" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    done = to_lora(theirs)
    assert done.returncode == 4
    assert re.search(
        r"theirs is damaged: adapter_model.safetensors (ends within its header|has [\d,]+ bytes)", done.stderr
    )
    assert "[damaged_artifact]" in done.stderr


def test_an_adapter_for_another_base_is_refused(tmp_path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    trained(other, FAMILY, CASES["lora"])
    to_hf(other, "lora", "theirs")
    write_base(tmp_path, FAMILY, seed=9)
    done = to_lora(tmp_path, hf_adapter_path=str(other / "theirs"))
    assert done.returncode == 4
    assert "was trained on another base than base" in done.stderr
    assert "[base_model_mismatch]" in done.stderr
    (other / "theirs" / "artifact.json").unlink()  # then only shapes can tell
    for overrides, told in (
        ({"num_hidden_layers": 2}, "the adapter is for model.layers.2.self_attn.q_proj, which the base does not have"),
        ({"intermediate_size": 160}, "model.layers.0.mlp.gate_proj is [96, 64] there and [160, 64] in the base"),
    ):
        place = tmp_path_factory.mktemp("shape")
        write_base(place, FAMILY, **overrides)
        done = to_lora(place, hf_adapter_path=str(other / "theirs"))
        assert done.returncode == 4
        assert told in done.stderr
        assert "[base_model_mismatch]" in done.stderr


def test_wrong_inputs_are_told(theirs):
    done = to_lora(theirs, hf_adapter_path="nowhere")
    assert done.returncode == 4
    assert "there is no checkpoint_hf_adapter at nowhere" in done.stderr
    done = to_lora(theirs, hf_adapter_path="source")
    assert done.returncode == 4
    assert "source is no checkpoint_hf_adapter: it has no adapter_config.json" in done.stderr
    done = to_lora(theirs, hf_adapter_path="base")
    assert done.returncode == 4
    assert "base is a checkpoint_megatron, not a checkpoint_hf_adapter" in done.stderr
    (theirs / "theirs" / "adapter_model.safetensors").rename(theirs / "theirs" / "adapter_model.bin")
    done = to_lora(theirs)
    assert done.returncode == 4
    assert "it has adapter_model.bin, a pickle, and no adapter_model.safetensors" in done.stderr


def test_a_step_that_wants_our_adapter_says_how_to_make_one_of_theirs(theirs):
    merge = {
        "lora_checkpoint": "theirs",
        "base_megatron_path": "base",
        "base_hf_path": None,
        "output_hf_path": "merged",
    }
    done = run_step("convert/merge_lora", merge, theirs)
    assert done.returncode == 4
    assert "a Hugging Face PEFT adapter, of which `steps run convert/hf_to_lora` makes one" in done.stderr
