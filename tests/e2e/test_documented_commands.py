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


def test_the_readme_shows_these_command_lines():
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", " ").split())
    for command in COMMANDS.values():
        assert command in text
