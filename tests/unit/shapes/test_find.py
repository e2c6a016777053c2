"""Finding a model's shape by what a person calls it."""

from __future__ import annotations

import json
import shutil

import pytest
from support.models import hf_config
from support.packed import SHAPE, write_base

from steps.artifacts.record import RECORD
from steps.errors import ArtifactError, UsageError
from steps.shapes.find import find
from steps.shapes.presets import preset


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("find") / "base"
    write_base(path)
    return path


def write_hf(path, name="llama", **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**hf_config(name).to_dict(), **changes}))
    return path


def test_a_preset_unless_there_is_a_directory_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("7B").model is preset("7B")
    assert find("7B").where == "the shipped shapes"
    write_hf(tmp_path / "7B")
    assert find("7B").model.hidden_size == 64
    assert find("7B").where == "7B/config.json"


def test_a_hugging_face_directory_or_its_config_json(tmp_path):
    found = find(str(write_hf(tmp_path / "model", torch_dtype="bfloat16", dtype="bfloat16")))
    assert (found.model.num_layers, found.model.params_dtype) == (3, "bfloat16")
    assert find(str(tmp_path / "model" / "config.json")).model == found.model


def test_a_megatron_checkpoint_by_its_record_and_without_one(base, tmp_path):
    assert find(str(base)).model == SHAPE
    assert find(str(base)).where == str(base / RECORD)
    assert find(str(base / "iter_0000000")).model == SHAPE
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / RECORD).unlink()
    for path in (bare, bare / "iter_0000000", bare / "iter_0000000" / "run_config.yaml"):
        found = find(str(path))
        assert found.model == SHAPE
        assert found.where.endswith("iter_0000000/run_config.yaml")


def test_names_that_mean_nothing():
    with pytest.raises(UsageError, match=r"llama-2-7c: is neither a path.*Did you mean llama-2-7b\?"):
        find("llama-2-7c")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere" / "model", "there is no model at "),
        (lambda path: path / "x.json", "there is no model at "),
        (lambda path: _text(path / "m.gguf", "GGUF"), "steps run convert/hf_to_megatron hf_model_id="),
        (lambda path: _text(path / "notes.txt", ""), "is neither a config.json nor a directory with a model"),
        (lambda path: _text(path / "config.json", "{"), "is no JSON"),
        (lambda path: _text(path / "config.json", "[]"), "holds no mapping"),
        (lambda path: _text(path / "config.json", '{"model_type": "lama"}'), "Did you mean llama?"),
        (lambda path: path, "holds neither config.json nor a Megatron checkpoint"),
        (lambda path: _text(path / "adapter_config.json", "{}").parent, "Name the base model that it belongs to"),
        (lambda path: _text(path / "run_config.yaml", "a: [1"), "run_config.yaml"),
        (lambda path: _text(path / "run_config.yaml", "a: 1"), "has no section model"),
        (lambda path: path / ("x" * 300), "name too long"),
    ],
)
def test_what_is_no_model(make, message, tmp_path):
    with pytest.raises(ArtifactError) as caught:
        find(str(make(tmp_path)))
    assert message in str(caught.value)


def _text(path, text):
    path.write_text(text)
    return path


def test_the_hub_out_of_reach(monkeypatch):
    with pytest.raises(
        ArtifactError, match=r"config.json of org/model is not in the local cache and cannot be fetched"
    ):
        find("org/model")
