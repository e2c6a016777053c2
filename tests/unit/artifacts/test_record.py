"""An artifact appears whole or not at all, and says what it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from steps.artifacts import graph, packed_parquet, record
from steps.artifacts.opening import open_artifact
from steps.artifacts.record import Record, publish, read
from steps.errors import ArtifactError, StepFailed, UsageError


def make(path, text="data", kind="raw_jsonl", **facts):
    new = Record(type=kind)
    with publish(path, new) as partial:
        (partial / "conversations.jsonl").write_text(text)
        new.facts.update(facts)
    return path


def test_written_and_read_back(tmp_path):
    make(tmp_path / "a", rows=3)
    found = read(tmp_path / "a")
    assert found.type == "raw_jsonl"
    assert found.facts == {"rows": 3}
    assert found.files == {"conversations.jsonl": 4}
    assert len(found.digest) == 64
    assert found.created_at
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_digest_is_of_the_contents(tmp_path):
    same, other = make(tmp_path / "a"), make(tmp_path / "b", "datb")
    assert read(make(tmp_path / "c")).digest == read(same).digest != read(other).digest


def test_a_failure_leaves_the_old_one_and_no_leftovers(tmp_path):
    make(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), publish(tmp_path / "a", Record(type="raw_jsonl")) as partial:
        (partial / "conversations.jsonl").write_text("half")
        raise RuntimeError
    assert (tmp_path / "a" / "conversations.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_rerun_replaces_and_never_mixes(tmp_path):
    make(tmp_path / "a")
    new = Record(type="raw_jsonl")
    with publish(tmp_path / "a", new) as partial:
        (partial / "other.jsonl").write_text("x")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["artifact.json", "other.jsonl"]


def test_what_we_did_not_make_is_not_overwritten(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="was not made by steps; it is not overwritten"):
        make(tmp_path / "a")
    make(tmp_path / "b")
    with pytest.raises(ArtifactError, match="holds a raw_jsonl"):
        make(tmp_path / "b", kind="packed_parquet")
    assert (tmp_path / "a" / "thesis.txt").exists()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("there", "not_yet"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    make(tmp_path / "disk" / "there", "old")
    for name in ("there", "not_yet"):
        make(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name / "conversations.jsonl").read_text() == "new"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ArtifactError, match="leads to itself"):
        make(tmp_path / "loop")


def test_two_writers_do_not_mix(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from steps.artifacts.record import Record, publish\n"
        "with publish(Path(sys.argv[1]), Record(type='raw_jsonl')) as p: print('in', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(StepFailed, match="another run is writing"):
        make(tmp_path / "a")
    other.send_signal(signal.SIGKILL)
    other.wait()
    make(tmp_path / "a")  # the lock died with its holder, the leftovers are cleared
    assert read(tmp_path / "a").files == {"conversations.jsonl": 4}


def test_killed_between_the_two_renames_loses_nothing(tmp_path):
    make(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / ".a.old")
    with pytest.raises(RuntimeError), publish(tmp_path / "a", Record(type="raw_jsonl")):
        raise RuntimeError
    assert (tmp_path / "a" / "conversations.jsonl").read_text() == "old"


def test_damage_is_noticed(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a" / "conversations.jsonl").write_text("shorter or longer")
    with pytest.raises(ArtifactError, match="is damaged: conversations.jsonl is missing or has another size"):
        open_artifact(str(tmp_path / "a"), "training_jsonl")


def test_opening_checks_the_type_and_names_the_way(tmp_path):
    make(tmp_path / "a")
    assert open_artifact(str(tmp_path / "a"), "training_jsonl").type == "training_jsonl"
    with pytest.raises(ArtifactError) as caught:
        open_artifact(str(tmp_path / "a"), "packed_parquet", "key")
    assert caught.value.name == "wrong_type"
    make(tmp_path / "b", kind="checkpoint_megatron")
    with pytest.raises(ArtifactError, match="convert/megatron_to_hf"):
        open_artifact(str(tmp_path / "b"), "checkpoint_hf")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(str(tmp_path / "nowhere"), "packed_parquet", "dataset.x")
    assert (caught.value.name, caught.value.exit_code) == ("missing_packed_parquet", 4)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"type": "raw_jsonl", "format_version": 99}', '{"type": ["x"]}',
        '{"type": "raw_jsonl", "facts": []}', '{"type": "raw_jsonl", "inputs": [{"x": 1}]}',
        '{"type": "raw_jsonl", "files": ["x"]}', '{"type": "raw_jsonl", "format_version": "2"}',
    ],
)  # fmt: skip
def test_a_broken_record_is_an_error_not_a_guess(tmp_path, text):
    (tmp_path / record.RECORD).write_text(text)
    with pytest.raises(ArtifactError):
        read(tmp_path)


def test_without_a_record_the_contents_are_taken_on_trust_and_said_so(tmp_path):
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "train" / "shard.parquet").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "splits", tmp_path / "splits" / "train"):
        found = open_artifact(str(path), "packed_parquet")
        assert found.path == tmp_path
        assert "no artifact.json" in found.warnings[0]


def test_write_text_keeps_the_mode(tmp_path):
    record.write_text(tmp_path / "s.sh", "x", mode=0o700)
    assert (tmp_path / "s.sh").stat().st_mode & 0o777 == 0o700
    assert json.dumps(os.listdir(tmp_path)) == '["s.sh"]'
    assert time.time() - (tmp_path / "s.sh").stat().st_mtime < 60


def test_types_follow_is_a():
    assert graph.is_a("raw_jsonl", "training_jsonl")
    assert not graph.is_a("training_jsonl", "raw_jsonl")
    assert graph.route("checkpoint_lora", "checkpoint_megatron") == ["convert/merge_lora", "convert/hf_to_megatron"]
    assert graph.route("raw_jsonl", "training_jsonl") == []
    assert graph.route("packed_parquet", "checkpoint_hf") is None
    with pytest.raises(UsageError, match="Did you mean packed_parquet"):
        graph.known("packed_parket")


@pytest.mark.parametrize("below", ["", "splits", "splits/train", "splits/train/*.parquet"])
def test_packed_data_is_found_however_far_down_its_path_goes(tmp_path, below):
    shard = tmp_path / "packed" / "splits" / "train" / "shard_0.parquet"
    shard.parent.mkdir(parents=True)
    shard.touch()
    path = tmp_path / "packed" / below
    assert open_artifact(str(path), "packed_parquet").path == tmp_path / "packed"
    assert packed_parquet.shards(path, "train") == [shard]
    shard.unlink()
    with pytest.raises(ArtifactError, match="splits/train holds no .parquet file"):
        open_artifact(str(path), "packed_parquet")
    shard.parent.rmdir()
    shard.parent.parent.rmdir()
    with pytest.raises(ArtifactError, match="there is no|has no folder splits") as caught:
        open_artifact(str(path), "packed_parquet")
    assert caught.value.name == ("missing_packed_parquet" if below else "wrong_type")
