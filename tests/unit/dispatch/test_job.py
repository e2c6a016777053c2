"""What an executor gets, and what must never be written down."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.steps import fake_step

from steps.config.base import RunEnv
from steps.dispatch import executors
from steps.dispatch.executors.local import script
from steps.dispatch.job import MASK, JobSpec, create, is_secret, new_spec
from steps.errors import ExecutorError


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "hf_token",
        "GITHUB_AUTH",
        "SSH_KEY_FILE",
        "OPENAI_KEY",
        "DB_PASS",
        "MYSQL_PWD",
        "GITHUB_PAT",
        "HF_TOKENS",
    ],
)
def test_secrets_are_known_by_the_words_of_their_name(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "CALCULATE_PER_TOKEN_LOSS",
        "KEYBOARD",
        "MONKEY",
        "AUTHOR",
        "OMP_NUM_THREADS",
        "PATH",
    ],
)
def test_words_that_only_look_alike_are_not(name):
    assert not is_secret(name)


def spec(tmp_path: Path, launch: str = "torchrun", **environment) -> JobSpec:
    step = fake_step(tmp_path, default="a: 1\n")
    step = replace(step, run=replace(step.run, launch=launch))
    config = {"a": 1, "run": {"env": environment}}
    return new_spec(
        step, config, RunEnv.model_validate(environment), sources={}, config_name="default", profile="local",
        torchrun=False,
    )  # fmt: skip


def test_one_process_needs_no_torchrun_and_several_get_it(tmp_path):
    assert not spec(tmp_path).torchrun
    assert spec(tmp_path, nprocs_per_node=2).torchrun
    assert spec(tmp_path, gpus_per_node=4).nprocs == 4
    assert not spec(tmp_path, launch="python", gpus_per_node=4).torchrun
    assert spec(tmp_path, launch="python", gpus_per_node=4).nprocs == 1


def test_the_script_as_a_whole(tmp_path):
    given = replace(
        spec(tmp_path, nprocs_per_node=2, env_vars={"NAME": "it's $HOME", "HF_TOKEN": "hidden"}),
        directory=Path("jobs/x y"),
        passthrough=("--flag", "a b"),
        debug=True,
    )
    assert script(given).replace(sys.executable, "PYTHON") == (
        "#!/bin/sh\n"
        "export NAME='it'\"'\"'s $HOME'\n"
        "exec PYTHON -m steps.runtime.torchrun --standalone --nproc-per-node=2 "
        "-m steps.test.fake.step --config 'jobs/x y/config.yaml' --debug -- --flag 'a b'\n"
    )


def test_a_job_directory_is_made_once_and_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = spec(tmp_path, env_vars={"HF_TOKEN": "hidden", "PLAIN": "seen"})
    create(given, {"command.sh": script(given)})
    text = "".join(path.read_text() for path in given.directory.iterdir())
    assert "hidden" not in text + repr(given)
    assert f"HF_TOKEN: {MASK}" in text
    assert "export PLAIN=seen" in text
    assert given.secret_env == {"HF_TOKEN": "hidden"}
    with pytest.raises(FileExistsError):
        create(given, {})


def test_executors_are_found_by_their_file():
    assert set(executors.names()) == {"lepton", "local", "slurm"}
    with pytest.raises(ExecutorError, match="Did you mean local"):
        executors.get("loacl")


def test_the_supervisor_of_a_detached_job_reports_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = spec(tmp_path)
    create(given, {"command.sh": "#!/bin/sh\necho said\nexit 7\n"})
    command = [sys.executable, "-m", "steps.dispatch.executors.local", str(given.directory)]
    assert subprocess.run(command).returncode == 7
    assert (given.directory / "log").read_text() == "said\n"
    assert '"state": "failed"' in (given.directory / "status.json").read_text()


def test_an_empty_secret_does_not_replace_the_one_of_the_shell(tmp_path):
    given = spec(tmp_path, env_vars={"HF_TOKEN": "", "EMPTY": ""})
    assert given.secret_env == {}
    assert given.env == {"EMPTY": ""}


def test_a_directory_that_cannot_be_filled_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = spec(tmp_path)
    with pytest.raises(OSError, match=r"File name too long|No such file"):
        create(given, {"x" * 300: "does not fit"})
    assert list(given.directory.parent.iterdir()) == []
