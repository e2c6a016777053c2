"""The step as real processes: killed, resumed, and run by two of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.packed import config, random_rows, write_base, write_packed

from steps.artifacts.record import missing_files, read
from steps.config import yaml12
from steps.engine.checkpoint.megatron import Checkpoint

MODULE = "steps.peft.megatron_bridge.step"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_base(root / "base")
    write_packed(root / "packed", random_rows(20), random_rows(6, seed=9))
    return root


def prepare(inputs: Path, job: Path, **sections) -> list[str]:
    """A job directory and the command that runs in it."""
    job.mkdir(parents=True, exist_ok=True)
    checkpoint = {"save": str(job / "lora"), **sections.pop("checkpoint", {})}
    (job / "config.yaml").write_text(yaml12.dump(config(inputs, checkpoint=checkpoint, **sections)))
    return [sys.executable, "-m", MODULE, "--config", "config.yaml"]


def run(command: list[str], job: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=job, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def curve(job: Path) -> dict[tuple[int, str], float]:
    """Loss, gradient norm and valid loss by iteration. A step that was done twice must have come out the same."""
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    found: dict[tuple[int, str], float] = {}
    for row in rows:
        for key in ("loss", "lr", "grad_norm", "tokens", "valid_loss"):
            if key in row:
                assert found.setdefault((row["iteration"], key), row[key]) == row[key]
    return found


def same_bits(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    return one == other


def result(job: Path) -> tuple[dict[str, torch.Tensor], dict]:
    checkpoint = Checkpoint.open(job / "lora")
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}, checkpoint.training_state()


LONG = {"train": {"train_iters": 60, "eval_interval": 7}, "peft": {"dropout": 0.2}}


def test_killed_at_random_moments_the_same_command_comes_to_the_same_bits(inputs, tmp_path):
    whole = tmp_path / "whole"
    done = run(prepare(inputs, whole, **LONG), whole)
    assert done.returncode == 0, done.stderr

    job, moments, kills = tmp_path / "killed", random.Random(0), 0
    command = prepare(inputs, job, **LONG)
    for _ in range(12):
        process = subprocess.Popen(command, cwd=job, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Start-up is most of it: wait for the first row of this attempt, then kill somewhere in the next steps.
        rows = _rows(job)
        while process.poll() is None and _rows(job) == rows:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.7))
        if process.poll() is None and kills < 3:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        if process.returncode == 0:
            break
    assert kills >= 2
    assert process.returncode == 0
    assert curve(job) == curve(whole)
    (tensors, state), (wanted_tensors, wanted_state) = result(job), result(whole)
    assert same_bits(tensors, wanted_tensors)
    assert same_bits(state, wanted_state)
    record = read(job / "lora")
    assert record.facts["finished"] is True
    assert not missing_files(job / "lora", record)
    assert not list((job / "lora").glob(".*"))


def _rows(job: Path) -> int:
    path = job / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_two_processes_give_the_loss_curve_of_one(inputs, tmp_path):
    """Float32 sums in another order: the first losses agree to 1e-6, the last after twelve Adam steps to 1e-4."""
    sections = {"train": {"micro_batch_size": 1}, "peft": {"dropout": 0.2}}
    one, two = tmp_path / "one", tmp_path / "two"
    single = run(prepare(inputs, one, **sections), one)
    assert single.returncode == 0, single.stderr
    command = prepare(inputs, two, **sections)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *command[2:]]
    double = run(torchrun, two)
    assert double.returncode == 0, double.stderr
    expected, got = curve(one), curve(two)
    assert expected.keys() == got.keys()
    for (iteration, key), value in expected.items():
        tolerance = 1e-6 if iteration <= 1 else 1e-4
        assert got[iteration, key] == pytest.approx(value, rel=tolerance), (iteration, key)
    again = run(torchrun, two)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing to do") == 1


def test_a_finished_run_says_so_and_a_different_one_is_refused(inputs, tmp_path):
    job = tmp_path / "job"
    short = {"train": {"train_iters": 3}}
    assert run(prepare(inputs, job, **short), job).returncode == 0
    summary = json.loads((job / "summary.json").read_text())
    assert summary["iteration"] == 3
    assert summary["trainable_parameters"] == 2944
    again = run(prepare(inputs, job, **short), job)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    other = run(prepare(inputs, job, **short, peft={"dim": 8}), job)
    assert other.returncode == 4
    assert "peft.dim: is 8, but the checkpoint at" in other.stderr
    assert "holds a run with other settings" in other.stderr  # the cause, out of the manifest


def test_a_second_writer_is_refused_while_the_first_one_runs(inputs, tmp_path):
    job = tmp_path / "job"
    command = prepare(inputs, job, train={"train_iters": 4000, "eval_interval": 0}, checkpoint={"save_interval": 1000})
    first = subprocess.Popen(command, cwd=job, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while _rows(job) < 2:
            assert first.poll() is None
            time.sleep(0.01)
        second = run(command, job)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 1
    assert "another run is writing" in second.stderr
