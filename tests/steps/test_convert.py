"""The conversions as a user runs them: results, records, and every failure with its message and exit code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.chat import smollm_gguf
from support.models import change_tensor, save_hf, save_tokenizer
from support.run_step import run_step

from steps.artifacts.opening import open_artifact
from steps.convert.megatron_to_hf.schema import Config as ToHf
from steps.errors import ArtifactError

pytest.importorskip("transformers", reason="extra parity")

TO_MEGATRON, TO_HF = "convert/hf_to_megatron", "convert/megatron_to_hf"


@pytest.fixture
def source(tmp_path):
    """A small sharded bfloat16 model with a tokenizer, in `source`."""
    save_hf(tmp_path / "source", "qwen2", dtype=torch.bfloat16, max_shard_size="40KB")
    save_tokenizer(tmp_path / "source")
    return tmp_path / "source"


def to_megatron(cwd, *, fresh=False, **changes):
    config = {"hf_model_id": "source", "megatron_path": "megatron", "dtype": "source"}
    return run_step(TO_MEGATRON, config | changes, cwd, fresh=fresh)


def to_hf(cwd, *, fresh=False, **changes):
    config = {"megatron_path": "megatron", "hf_path": "back", "hf_model_id": None}
    return run_step(TO_HF, config | changes, cwd, fresh=fresh)


def facts(path):
    return json.loads((path / "artifact.json").read_text())["facts"]


def test_there_and_back_with_tokenizer_record_and_summary(source, tmp_path):
    from transformers import PreTrainedTokenizerFast

    there = to_megatron(tmp_path, fresh=True)
    assert there.returncode == 0, there.stderr
    assert "checkpoint_megatron written to megatron" in there.stdout
    back = to_hf(tmp_path, fresh=True)
    assert back.returncode == 0, back.stderr
    shards = [load_file(file) for file in source.glob("*.safetensors")]
    original = {name: tensor for shard in shards for name, tensor in shard.items()}
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert set(written) == set(original)
    assert all(torch.equal(written[name], original[name]) for name in original)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    recorded, exported = facts(tmp_path / "megatron"), facts(tmp_path / "back")
    assert recorded == exported
    assert recorded["family"] == "qwen2"
    assert recorded["dtype"] == "bfloat16"
    assert recorded["parameters"] == sum(tensor.numel() for tensor in original.values())
    assert recorded["model"]["num_layers"] == 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["fingerprint"] == recorded["base_fingerprint"]
    assert summary["bytes"] == 2 * recorded["parameters"]
    loaded, first = (PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("back", "source"))
    message = [{"role": "user", "content": "w5 w6"}]
    ids = loaded.apply_chat_template(message, return_dict=False)
    assert ids == first.apply_chat_template(message, return_dict=False) == [2, 5, 6]
    digest = json.loads((tmp_path / "back" / "artifact.json").read_text())["inputs"][0]["digest"]
    assert digest == json.loads((tmp_path / "megatron" / "artifact.json").read_text())["digest"]


def test_a_model_without_tokenizer_is_converted_with_a_warning(tmp_path):
    save_hf(tmp_path / "source", "llama")
    done = to_megatron(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: written without a tokenizer" in done.stdout
    assert "tokenizer_digest" not in facts(tmp_path / "megatron")


def test_llama3_scaling_that_megatron_cannot_express_is_pointed_out(tmp_path):
    save_hf(tmp_path / "source", "llama_rope_scaling")
    done = to_megatron(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Megatron-Core fixes rope_scaling.original_max_position_embeddings at 8192; this model has 32" in done.stdout


def drop_shard(source):
    sorted(source.glob("*.safetensors"))[1].unlink()


def truncate(source):
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def change_config(**values):
    def change(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | values))

    return change


def drop_weights(source):
    for file in source.glob("*.safetensors*"):
        file.unlink()


def add_tensor(source):
    from safetensors.torch import save_file

    file = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(file) | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}
    save_file(tensors, file, metadata={"format": "pt"})


def quantize(source):
    from safetensors.torch import save_file

    file = sorted(source.glob("*.safetensors"))[0]
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


BAD_SOURCES = {
    "missing shard": (drop_shard, "missing (1 of", "damaged_artifact"),
    "truncated": (truncate, "is damaged", "damaged_artifact"),
    "unknown architecture": (
        change_config(model_type="mixtral"), "the architecture 'mixtral' is not supported", "unsupported_model",
    ),
    "other activation": (change_config(hidden_act="gelu"), "hidden_act: 'gelu' is not supported", "unsupported_model"),
    "no weights": (drop_weights, "it holds no .safetensors file", ""),
    "broken config": (lambda path: (path / "config.json").write_text("{"), "is no JSON", "damaged_artifact"),
    "other shape": (change_config(intermediate_size=128), "the configuration says [128, 64]", "unsupported_model"),
    "unknown tensor": (add_tensor, "o_proj.bias is not part of a supported model", "unsupported_model"),
    "quantized": (quantize, "has the dtype F8_E4M3. Allowed: F32, BF16, F16", "unsupported_model"),
}  # fmt: skip


BAD_DESCRIPTIONS = {
    "./nonexistent/dir": ("there is no model at nonexistent/dir", "missing_checkpoint_hf"),
    "empty": ("empty has no config.json", "missing_checkpoint_hf"),
    "mixtral": ("the architecture 'mixtral' is not supported", "unsupported_model"),
    "broken": ("is no JSON", "damaged_artifact"),
}


@pytest.mark.parametrize("model", BAD_DESCRIPTIONS)
def test_a_bad_model_to_describe_the_checkpoint_is_found_by_a_dry_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"mixtral": '{"model_type": "mixtral"}', "broken": "{", "empty": None}.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.json").write_text(text)
    message, name = BAD_DESCRIPTIONS[model]
    (problem,) = ToHf(megatron_path="megatron", hf_path="back", hf_model_id=model).check_inputs({})
    assert message in str(problem)
    assert problem.name == name


def test_a_good_model_to_describe_the_checkpoint_passes_the_dry_run(source):
    for model in (str(source), "org/name", smollm_gguf(), None):
        assert list(ToHf(megatron_path="megatron", hf_path="back", hf_model_id=model).check_inputs({})) == []


@pytest.mark.parametrize("kind", ["missing shard", "index", "renamed"])
def test_missing_shards_are_found_on_opening(kind, source):
    assert open_artifact(str(source), "checkpoint_hf").path == source
    index = source / "model.safetensors.index.json"
    if kind == "missing shard":
        drop_shard(source)
    elif kind == "index":
        index.write_text('{"weight_map": []}')
    else:
        index.unlink()
    with pytest.raises(ArtifactError) as caught:
        open_artifact(str(source), "checkpoint_hf", "hf_model_id")
    message, name = {
        "missing shard": ("missing (1 of", "damaged_artifact"),
        "index": ("model.safetensors.index.json cannot be read", "damaged_artifact"),
        "renamed": ("it has neither model.safetensors nor", "wrong_type"),
    }[kind]
    assert message in str(caught.value)
    assert caught.value.name == name


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_source_is_refused_and_nothing_is_left(kind, source, tmp_path):
    spoil, message, name = BAD_SOURCES[kind]
    spoil(source)
    done = to_megatron(tmp_path)
    assert done.returncode == 4, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if name:
        assert f"[{name}]" in done.stderr, "the manifest tells cause and recovery"
    assert not (tmp_path / "megatron").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_hub_id_without_connection_says_so(tmp_path):
    done = to_megatron(tmp_path, hf_model_id="nobody/has-this-model")
    assert done.returncode == 4
    assert "nobody/has-this-model is not in the local cache and cannot be fetched" in done.stderr
    assert "give the path of a local directory" in done.stderr


def test_a_missing_source_and_a_wrong_dtype_are_told(tmp_path):
    done = to_megatron(tmp_path, hf_model_id="nowhere/at/all")
    assert done.returncode == 4
    assert "there is no checkpoint_hf at nowhere/at/all" in done.stderr
    done = to_megatron(tmp_path, dtype="float64")
    assert done.returncode == 3
    assert "dtype: 'float64' is not one of the choices" in done.stderr


def test_a_damaged_or_foreign_checkpoint_is_refused(source, tmp_path):
    assert to_megatron(tmp_path).returncode == 0
    distcp = tmp_path / "megatron" / "iter_0000000" / "__0_0.distcp"
    whole = distcp.read_bytes()
    distcp.write_bytes(whole[: len(whole) // 2])
    done = to_hf(tmp_path)
    assert done.returncode == 4
    assert "__0_0.distcp is missing or has another size" in done.stderr
    (tmp_path / "megatron" / "artifact.json").unlink()  # without a record the damage shows while reading
    done = to_hf(tmp_path)
    assert done.returncode == 4
    assert "is damaged" in done.stderr
    assert not (tmp_path / "back").exists()
    done = to_hf(tmp_path, megatron_path="source")
    assert done.returncode == 4
    assert "source is no checkpoint_megatron" in done.stderr


def flip(file):
    """Change one bit of the last tensor: same size, another model."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_weights_that_changed_under_their_record_are_not_passed_on(source, tmp_path):
    assert to_megatron(tmp_path).returncode == 0
    assert to_hf(tmp_path).returncode == 0
    flip(tmp_path / "back" / "model.safetensors")
    done = to_megatron(tmp_path, hf_model_id="back", megatron_path="again")
    assert done.returncode == 4
    assert "back is damaged: its weights have the fingerprint" in done.stderr
    assert "[damaged_artifact]" in done.stderr
    assert to_megatron(tmp_path, hf_model_id="back", megatron_path="cast", dtype="float32").returncode == 0
    change_tensor(tmp_path / "megatron" / "iter_0000000")
    done = to_hf(tmp_path, hf_path="back2")
    assert done.returncode == 4
    assert "iter_0000000 is damaged: its weights have the fingerprint" in done.stderr
    assert "[damaged_artifact]" in done.stderr
    assert not [name for name in ("again", "back2") if (tmp_path / name).exists()]
    assert not list(tmp_path.glob(".*.partial"))


def test_config_and_tokenizer_can_come_from_a_model_of_the_same_shape(source, tmp_path):
    assert to_megatron(tmp_path).returncode == 0
    iteration = tmp_path / "megatron" / "iter_0000000"
    shutil.rmtree(iteration / "hf")
    shutil.rmtree(iteration / "tokenizer")
    (tmp_path / "megatron" / "artifact.json").unlink()
    done = to_hf(tmp_path, hf_model_id="source")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    save_hf(tmp_path / "other", "llama")
    done = to_hf(tmp_path, hf_path="back2", hf_model_id="other")
    assert done.returncode == 4
    assert "family llama instead of qwen2" in done.stderr
    assert "[base_model_mismatch]" in done.stderr


def test_what_others_wrote_is_not_overwritten(source, tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "thesis.txt").write_text("years of work")
    done = to_megatron(tmp_path)
    assert done.returncode == 4
    assert "was not made by steps; it is not overwritten" in done.stderr
    assert (tmp_path / "megatron" / "thesis.txt").read_text() == "years of work"
