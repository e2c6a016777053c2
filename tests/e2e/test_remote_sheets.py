"""Dry runs of remote jobs: what a profile, the command line and a manifest make of a script. No cluster is needed."""

from __future__ import annotations

import json
from pathlib import Path

from support.steps import steps

PROFILE = '[here]\nexecutor = "slurm"\npartition = "batch"\n[bare]\nextends = "here"\ncontainer_image = ""\n'


def sheet(directory: Path, *arguments: str, code: int = 0) -> dict:
    (directory / "env.toml").write_text(PROFILE)
    done = steps("run", *arguments, "-d", "--json", cwd=directory)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_where_to_run_is_said_for_the_whole_chain(tmp_path):
    chain = sheet(
        tmp_path, "convert/merge_lora", "-c", "tiny", "--upstream", "-b", "here",
        "run.env.partition=debug", "run.env.time=12:00:00",
    )  # fmt: skip
    assert len(chain["steps"]) == 5
    for entry in chain["steps"]:
        assert "#SBATCH --partition=debug\n" in entry["files"]["sbatch.sh"], entry["step"]
        assert "#SBATCH --time=12:00:00\n" in entry["files"]["sbatch.sh"], entry["step"]


def test_what_to_compute_is_said_for_the_last_step_only(tmp_path):
    chain = sheet(tmp_path, "peft/megatron_bridge", "-c", "tiny", "--upstream", "-b", "here", "rng.seed=7")
    assert [entry["config"].get("rng") for entry in chain["steps"]][-1] == {"seed": 7}
    assert all("rng" not in entry["config"] for entry in chain["steps"][:-1])


def test_an_empty_image_means_no_container_and_none_means_the_steps_own(tmp_path):
    command = ("peft/megatron_bridge", "-c", "tiny", "--upstream", "-b")
    own = sheet(tmp_path, *command, "here")["steps"][-1]["files"]["sbatch.sh"]
    assert "image='nvcr.io#nvidia/nemo:" in own
    bare = sheet(tmp_path, *command, "bare")["steps"][-1]["files"]["sbatch.sh"]
    assert "image=" not in bare
    assert "no container image" in bare


def test_inputs_are_looked_for_in_the_workspace(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    made = steps("run", "data_prep/demo_chat", "-c", "tiny", "max_conversations=3", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "output").rename(there)
    command = ("data_prep/sft_packing", "-c", "tiny", "-b", "here", f"run.env.workspace={there.parent}")
    missing = sheet(here, *command, code=4)
    assert missing["problems"][0]["what"] == f"there is no training_jsonl at {tmp_path}/output/tiny/chat"
    there.rename(tmp_path / "output")
    found = sheet(here, *command)["steps"][0]["inputs"]["blend_path"]
    assert found == {"type": "training_jsonl", "value": f"{tmp_path}/output/tiny/chat", "state": "found"}


def test_nodes_for_a_step_that_runs_on_one_are_noted(tmp_path):
    entry = sheet(tmp_path, "data_prep/demo_chat", "-c", "tiny", "-b", "here", "run.env.nodes=2")["steps"][0]
    assert "run.env.nodes: data_prep/demo_chat runs on one node" in entry["notes"]
    assert "#SBATCH --nodes=1\n" in entry["files"]["sbatch.sh"]
