"""What travels with a job, unpacked by the command that a worker runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steps
from steps.dispatch.executors.lepton import package

SHELLS = [[], *([["busybox"]] if shutil.which("busybox") else [])]
LARGEST_ARGUMENT, LARGEST_REQUEST = 128 * 1024, 1024 * 1024


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_it_arrives_whole_and_runs_there(shell, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: 1\n")
    target = tmp_path / "a store" / "$(touch pwned)" / "job"
    command = package.unpack([file], str(target))
    subprocess.run([*shell, *command], check=True, cwd=tmp_path)
    assert not (tmp_path / "pwned").exists()
    assert (target / "config.yaml").read_text() == "a: 1\n"
    source = Path(steps.__file__).parent
    here = {path.relative_to(source): path.read_bytes() for path in source.rglob("*.py")}
    there = {path.relative_to(target / "code/steps"): path.read_bytes() for path in target.rglob("*.py")}
    assert here == there
    assert (target / "code/steps/peft/megatron_bridge/step.toml").exists()
    assert not list(target.rglob("__pycache__"))
    code = "import steps, sys; sys.stdout.write(steps.__file__)"
    env = {"PYTHONPATH": str(target / "code")}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert told == str(target / "code/steps/__init__.py")


def test_it_is_small_enough_for_a_request(tmp_path):
    command = package.unpack([], "/mnt/shared/nemo-run/job")
    assert max(map(len, command)) < LARGEST_ARGUMENT
    # Room for the rest of the request: configuration and script are kilobytes.
    assert len(json.dumps(command)) < LARGEST_REQUEST * 3 / 4


def test_an_archive_that_was_cut_is_a_failure(tmp_path):
    *command, _ = package.unpack([], str(tmp_path / "job"))
    assert subprocess.run(command, capture_output=True).returncode != 0
