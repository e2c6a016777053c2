"""train.recompute_granularity=auto in a run: decided by the memory there is, said, and without effect on the result."""

from __future__ import annotations

import pytest
import torch
from support.adapters import Rows
from support.adapters import train as run
from support.packed import random_rows, write_base, write_packed

from steps import machine
from steps.artifacts import record
from steps.config.training import Train
from steps.engine.checkpoint import megatron
from steps.engine.model import decoder


@pytest.fixture
def root(tmp_path):
    write_base(tmp_path / "base")
    write_packed(tmp_path / "packed", random_rows(8), random_rows(2, seed=9))
    return tmp_path


class Log(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def trained(root, monkeypatch):
    """Trains with so much memory available; returns the lines of the log, the tensors, and how many layers were
    computed again."""
    again = []
    original = decoder.checkpoint
    monkeypatch.setattr(decoder, "checkpoint", lambda *args, **options: again.append(1) or original(*args, **options))

    def train(name: str, available: int | None, **settings: object) -> tuple[list[str], dict[str, torch.Tensor], int]:
        again.clear()
        monkeypatch.setattr(machine, "available_bytes", lambda: available)
        monkeypatch.setattr(machine, "own_bytes", lambda: 0)  # what the tests have in memory is not the step's
        log = Log()
        monkeypatch.setattr("support.adapters.Rows", lambda: log)
        run(root, train={"train_iters": 3, **settings}, checkpoint={"save": str(root / name)})
        checkpoint = megatron.Checkpoint.open(root / name)
        return log.lines, {key: tensor.load() for key, tensor in checkpoint.tensors.items()}, len(again)

    return train


def test_auto_follows_the_memory_and_changes_nothing_else(root, trained):
    assert Train(train_iters=1, global_batch_size=1).recompute_granularity == "auto"
    plenty, one, never = trained("plenty", 10**12)
    little, other, often = trained("little", 0)
    assert never == 0
    assert often > 0
    assert any(line.startswith("train.recompute_granularity=auto: none; the ") for line in plenty)
    assert any(line.startswith("train.recompute_granularity=auto: full; the ") for line in little)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line for line in little if line.startswith("warning: the expected peak of ")]
    assert not [line for line in plenty if line.startswith("warning:")]
    facts = [record.read(root / name).facts["identity"] for name in ("plenty", "little")]
    assert facts[0] == facts[1]
    assert not any("recompute" in key for key in facts[0])


def test_a_run_goes_on_whatever_is_decided_now(root, trained):
    trained("run", 10**12)
    _, _, often = trained("run", 0, train_iters=5)
    assert often > 0


def test_a_kernel_that_does_not_say_means_none(trained):
    lines, _, never = trained("run", None)
    assert never == 0
    assert any("auto: decided where it runs" in line for line in lines)


def test_what_was_set_is_not_decided(trained):
    lines, _, often = trained("full", 10**12, recompute_granularity="full")
    assert often > 0
    assert not any("recompute" in line for line in lines)
