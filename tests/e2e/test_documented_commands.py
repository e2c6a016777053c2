"""The command lines of the field's documents, as they stand (apart from their first word), as dry runs with a golden.

STEPS_UPDATE_GOLDENS=1 writes the goldens anew.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from support.steps import steps

GOLDEN = Path(__file__).parents[1] / "golden" / "commands"
COMMANDS = {
    "lepton": "steps run peft/megatron_bridge -c default -r lepton_peft_megatron_bridge "
    "peft.dim=16 recipe.seq_length=8192 train.train_iters=2000",
    "slurm": "steps run peft/megatron_bridge -c default -b slurm_peft_megatron_bridge "
    "peft.dim=32 recipe.tensor_model_parallel_size=8 train.global_batch_size=64",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_documented_command_line_works_as_it_stands(name, tmp_path):
    (tmp_path / "pyproject.toml").touch()  # no env.toml is looked for above
    bare = {"HOME": str(tmp_path), "USER": "ada", "SLURM_HOST": "login.example.com"}
    for variable in ("HF_TOKEN", "WANDB_API_KEY"):
        assert variable not in os.environ, "the golden is for a shell without tokens"
    done = steps(*shlex.split(COMMANDS[name])[1:], "-d", cwd=tmp_path, env=bare)
    assert done.returncode == 0, done.stderr
    seen = re.sub(r"\d{8}-\d{6}-peft-megatron_bridge-[0-9a-f]{6}", "<job id>", done.stdout)
    seen = re.sub(r"megatron-bridge-\d{12}-[0-9a-f]{6}\b", "<name>", seen)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("STEPS_UPDATE_GOLDENS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(seen)
    assert path.is_file(), f"no golden {path}: STEPS_UPDATE_GOLDENS=1 writes it"
    assert seen == path.read_text()


def in_the_readme() -> list[list[str]]:
    """The commands of the README's section about clusters."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.partition("## On a cluster\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readme_shows_these_command_lines():
    shown = in_the_readme()
    assert all(shlex.split(command) in shown for command in COMMANDS.values())


@pytest.mark.parametrize("words", [words for words in in_the_readme() if words[1] == "run"], ids=" ".join)
def test_what_the_readme_runs_on_a_cluster_can_be_planned(words, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    if "--after" in words:  # there is no such job here
        words = words[: words.index("--after")]
    done = steps(*words[1:], "-d", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_the_readme_says_of_profiles_and_jobs(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    other = [words[1:] for words in in_the_readme() if words[1] != "run"]
    assert {words[0] for words in other} == {"profiles", "jobs"}
    done = steps("run", "data_prep/demo_chat", "-c", "tiny", "max_conversations=3", "-b", "local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    newest = max((tmp_path / ".steps/jobs").iterdir()).name
    for words in other:
        done = steps(*(newest[-6:] if word == "2060b1" else word for word in words), cwd=tmp_path)
        expected = 5 if words[:2] == ["profiles", "check"] else 0  # the starter has to be filled in first
        assert done.returncode == expected, (words, done.stdout, done.stderr)
