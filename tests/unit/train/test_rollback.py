"""Going back with checkpoint.ckpt_step: what is left, what the record says, and what a second attempt goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.packed import config, random_rows, write_base, write_packed

from steps.artifacts.opening import open_artifact
from steps.artifacts.record import Record, missing_files, read
from steps.config.validate import validate
from steps.engine.checkpoint import megatron
from steps.engine.checkpoint.megatron import Checkpoint, iterations
from steps.engine.checkpoint.merge import open_adapter
from steps.engine.progress import Silent
from steps.engine.train import bases, loop
from steps.engine.train.finetune import finetune
from steps.errors import StepsError
from steps.peft.megatron_bridge.schema import BASE, DATA, Config


class Iterations(Silent):
    def __init__(self):
        self.trained = []

    def metrics(self, values):
        if "loss" in values:
            self.trained.append(values["iteration"])


@pytest.fixture
def root(tmp_path):
    write_base(tmp_path / "base")
    write_packed(tmp_path / "packed", random_rows(20), random_rows(6, seed=9))
    return tmp_path


def train(root: Path, train_iters: int, save: str = "lora", precision: str = "auto", **checkpoint) -> list[int]:
    """Train; the iterations that were done for it."""
    checkpoint = {"save": str(root / save), "save_interval": 5, **checkpoint}
    train = {"train_iters": train_iters, "precision": precision}
    data = config(root, checkpoint=checkpoint, train=train, scheduler={"lr_decay_style": "constant"})
    inputs = {
        DATA: open_artifact(str(root / "packed"), "packed_parquet", DATA),
        BASE: open_artifact(str(root / "base"), "checkpoint_megatron", BASE),
    }
    progress = Iterations()
    finetune(validate(Config, data)[0].plan(inputs), Record(type="checkpoint_lora"), progress)
    return progress.trained


def is_sound(save: Path, iteration: int, saved: list[int]) -> None:
    record = read(save)
    assert record.facts["iteration"] == Checkpoint.open(save).iteration == iteration
    assert iterations(save) == saved
    assert torch.load(save / "latest_train_state.pt")["step"] == iteration
    assert record.facts["finished"] is True
    assert not missing_files(save, record)
    assert not list(save.glob(".*"))
    assert open_adapter(save).checkpoint.iteration == iteration


def killed(monkeypatch, step: int):
    """The loss of the step-th optimizer step raises, as a kill at that moment would end the run."""
    calls, original = 0, loop.Trainer._step

    def stop(self, position):
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        return original(self, position)

    monkeypatch.setattr(loop.Trainer, "_step", stop)


def test_back_to_a_save_without_training(root):
    train(root, 20)
    assert train(root, 10, ckpt_step=10) == []
    is_sound(root / "lora", 10, [5, 10])
    losses = read(root / "lora").facts["loss_last"]
    train(root, 10, save="whole")
    assert losses == read(root / "whole").facts["loss_last"]


def test_back_to_a_save_and_a_little_further(root):
    train(root, 20)
    assert train(root, 12, ckpt_step=10) == [11, 12]
    is_sound(root / "lora", 12, [5, 10, 12])


def test_the_same_command_goes_on_from_what_it_saved_after_going_back(root, monkeypatch):
    train(root, 20)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed(patch, 8)
        train(root, 25, ckpt_step=10)
    assert iterations(root / "lora") == [5, 10, 15]
    assert train(root, 25, ckpt_step=10) == list(range(16, 26))
    is_sound(root / "lora", 25, [5, 10, 15, 20, 25])
    assert train(root, 25, ckpt_step=10) == []  # finished
    assert train(root, 20, ckpt_step=10) == list(range(11, 21))  # another command goes back again
    assert train(root, 21) == [21]
    assert train(root, 20, ckpt_step=10) == list(range(11, 21))  # and so does one that another has gone on from
    is_sound(root / "lora", 20, [5, 10, 15, 20])


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("step", [10, None])
def test_killed_while_going_back(root, monkeypatch, moment, step):
    train(root, 20)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((megatron, "rewind") if moment == "before" else (shutil, "rmtree")), stop)
        train(root, 22, ckpt_step=10)
    assert train(root, 22, ckpt_step=step) == list(range(21 if moment == "before" and step is None else 11, 23))
    is_sound(root / "lora", 22, [5, 10, 15, 20, 22])


def test_going_back_with_a_checkpoint_of_another_directory(root, monkeypatch):
    train(root, 20)
    train(root, 8, save="other")
    load = {"save": "other", "load": str(root / "lora"), "ckpt_step": 15}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed(patch, 7)
        train(root, 24, **load)
    assert train(root, 24, **load) == [21, 22, 23, 24]
    is_sound(root / "other", 24, [5, 8, 15, 20, 24])
    assert train(root, 10, **{**load, "ckpt_step": 10}) == []
    is_sound(root / "other", 10, [5, 8, 10])


def test_another_precision_is_another_run(root, monkeypatch):
    """auto is decided by the hardware; the run goes on only in the dtype it began with."""
    train(root, 10, precision="auto")
    assert train(root, 11, precision="float32") == [11]
    with pytest.raises(StepsError, match=r"train.precision: .* in bfloat16, but .* float32") as caught:
        train(root, 11, precision="bfloat16")
    assert caught.value.name == "run_mismatch"
    monkeypatch.setattr(bases, "compute_dtype", lambda *_: torch.bfloat16)
    with pytest.raises(StepsError, match=r"train.precision: .* in bfloat16.* Set train.precision=float32") as caught:
        train(root, 12, precision="auto")
    assert caught.value.name == "run_mismatch"
    assert read(root / "lora").facts["iteration"] == 11
