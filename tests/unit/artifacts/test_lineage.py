"""Where an artifact came from, found again from its records."""

from __future__ import annotations

import json

import pytest

from steps.artifacts.lineage import trace, walk
from steps.artifacts.record import Input, Record, publish
from steps.dispatch.artifact_page import artifact, artifact_json, artifact_page
from steps.errors import ArtifactError


def make(path, type, inputs=(), content="", **facts):
    record = Record(type, {"step": f"some/{path.name}", "code_version": "1"}, inputs=list(inputs), facts=facts)
    with publish(path, record) as partial:
        (partial / "data").write_text(content or path.name)
    return record


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """chat -> packed -> lora <- base, named by relative paths as a user does; below the folder they were made in."""
    root = tmp_path / "project"
    root.mkdir()
    chat = make(root / "out" / "chat", "raw_jsonl", conversations=3)
    packed = make(
        root / "out" / "packed", "packed_parquet", [Input("blend_path", "out/chat", "training_jsonl", chat.digest)]
    )
    base = make(root / "out" / "base", "checkpoint_megatron")
    make(
        root / "out" / "lora", "checkpoint_lora",
        [
            Input("dataset.nano3_packed_sft_dir", "out/packed", "packed_parquet", packed.digest),
            Input("checkpoint.pretrained_checkpoint", "out/base", "checkpoint_megatron", base.digest),
        ],
        method="lora", loss_last=1.25, trainable_parameters=123456, peft={"dim": 4}, base_fingerprint="f" * 64,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return root


def test_the_chain_is_followed_to_its_beginnings_from_any_folder(chain):
    found = trace(chain / "out" / "lora")
    assert [(part.type, part.path, list(part.faults)) for part in walk(found)] == [
        ("checkpoint_lora", str(chain / "out" / "lora"), []),
        ("packed_parquet", "out/packed", []),
        ("raw_jsonl", "out/chat", []),
        ("checkpoint_megatron", "out/base", []),
    ]


def test_a_part_of_an_artifact_leads_to_the_whole(chain):
    make(
        chain / "out" / "report", "eval_report", [Input("examples_path", "out/chat/data", "training_jsonl")],
    )  # fmt: skip
    (chat,) = trace(chain / "out" / "report").made_from
    assert (chat.type, chat.path, chat.record.facts) == ("raw_jsonl", "out/chat/data", {"conversations": 3})
    (chain / "out" / "chat" / "mine.jsonl").write_text("{}")  # beside what the artifact holds
    assert trace(chain / "out" / "chat" / "mine.jsonl").record is None


def test_what_is_gone_damaged_or_made_anew_is_said(chain):
    (chain / "out" / "chat" / "data").write_text("longer than it was")
    (chain / "out" / "base").rename(chain / "elsewhere")
    make(chain / "out" / "packed", "packed_parquet", [Input("blend_path", "out/chat", "training_jsonl")], content="new")
    (chain / "out" / "packed" / "data").unlink()
    found = {part.path: " ".join(part.faults) for part in walk(trace(chain / "out" / "lora"))}
    assert found["out/base"] == "not there any more"
    assert "damaged: data is missing" in found["out/packed"]
    assert "made anew since" in found["out/packed"]
    assert "damaged: data is missing or has another size" in found["out/chat"]


def test_a_record_that_leads_back_to_itself_ends_there(tmp_path):
    make(tmp_path / "a", "packed_parquet", [Input("key", str(tmp_path / "a"), "packed_parquet", "")])
    (only,) = trace(tmp_path / "a").made_from
    assert only.faults == ("leads back to what was made from it",)
    assert not only.made_from


def test_the_page(chain):
    page = "\n".join(artifact_page(artifact(str(chain / "out" / "lora"))))
    for part in (
        "checkpoint_lora", "some/lora (steps 1)", "loss_last", "1.25", "123,456", "peft.dim", "ffffffffffff…",
        "├── packed_parquet  out/packed  by some/packed", "│   └── raw_jsonl  out/chat  by some/chat",
        "└── checkpoint_megatron  out/base  by some/base",
    ):  # fmt: skip
        assert part in page, part
    assert "\033" not in page


def test_json_holds_every_record(chain):
    data = json.loads(json.dumps(artifact_json(artifact(str(chain / "out" / "lora")))))
    assert data["record"]["facts"]["loss_last"] == 1.25
    assert data["made_from"][0]["made_from"][0]["record"]["facts"] == {"conversations": 3}


def test_what_other_tools_made_is_told_by_what_lies_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    page = "\n".join(artifact_page(artifact(str(tmp_path / "model"))))
    assert "checkpoint_hf" in page
    assert "It has no artifact.json" in page
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="is no artifact that steps knows"):
        artifact(str(tmp_path / "empty"))
