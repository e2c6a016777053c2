"""train.compile: the same run, other last bits; a run stays as it began."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.packed import config, random_rows, write_base, write_packed
from unit.train.test_loop import Recording, adapter, train

from steps.artifacts.opening import open_artifact
from steps.config.validate import validate
from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.model import fusion
from steps.engine.train import compiling
from steps.engine.train.finetune import probe
from steps.errors import ConfigError
from steps.peft.megatron_bridge.schema import BASE, DATA, Config

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


@pytest.fixture
def root(tmp_path):
    write_base(tmp_path / "base")
    write_packed(tmp_path / "packed", random_rows(20), random_rows(6, seed=9))
    return tmp_path


@needs_compiler
def test_compiled_and_as_written_give_one_loss_curve(root):
    written = train(root, train={"train_iters": 50, "compile": "never"}, checkpoint={"save": str(root / "written")})
    compiled = train(root, train={"train_iters": 50, "compile": "always"})
    assert any(line.startswith("torch.compile: 6 pieces in ") for line in compiled.lines)
    assert not fusion.active()
    # Sums round otherwise in their last bits (1e-7), fifty steps carry that on.
    assert compiled.losses() == pytest.approx(written.losses(), rel=1e-5)


@needs_compiler
def test_a_compiled_run_is_compiled_again_when_it_goes_on_and_ends_in_the_same_bits(root):
    train(root, train={"train_iters": 6, "compile": "always"}, checkpoint={"save_interval": 3})
    whole = adapter(root)
    shutil.rmtree(root / "lora")
    train(root, train={"train_iters": 3, "compile": "always"}, checkpoint={"save_interval": 3})
    assert Checkpoint.open(root / "lora").training_state()["compiled"] is True
    # So short a run would not be compiled by itself: it is, because it was.
    resumed = train(root, train={"train_iters": 6, "compile": "auto"}, checkpoint={"save_interval": 3})
    assert any(line.startswith("torch.compile: ") for line in resumed.lines)
    for name, tensor in adapter(root).items():
        assert torch.equal(tensor, whole[name]), name


@needs_compiler
def test_a_probe_is_compiled_as_its_run_would_be(root):
    progress, (typed, _) = Recording(), validate(Config, config(root, train={"compile": "always"}))
    inputs = {
        DATA: open_artifact(str(root / "packed"), "packed_parquet", DATA),
        BASE: open_artifact(str(root / "base"), "checkpoint_megatron", BASE),
    }
    assert probe(typed.plan(inputs), progress).tokens_per_second > 0
    assert any(line.startswith("torch.compile: 6 pieces in ") for line in progress.lines)
    assert not (root / "lora").exists()


def test_a_short_run_is_not_compiled(root):
    progress = train(root, train={"train_iters": 3})
    assert not any("torch.compile" in line for line in progress.lines)
    assert Checkpoint.open(root / "lora").training_state()["compiled"] is False


def test_it_pays_for_long_runs_only():
    cpu = torch.device("cpu")
    # SmolLM2-135M over the tiny chain's 20 steps of 4 rows, and over a thousand of the default's 16 rows of 4,096.
    assert not compiling.pays(134_515_008, 20 * 4 * 512, cpu)
    assert compiling.pays(134_515_008, 1000 * 16 * 4096, cpu)
    assert not compiling.pays(134_515_008, 10 * 16 * 4096, torch.device("cuda"))


def test_without_a_compiler_auto_says_so_and_always_is_refused(root, monkeypatch):
    monkeypatch.setattr(fusion, "start", lambda device: "no such compiler")
    monkeypatch.setattr("steps.engine.train.finetune.pays", lambda *_: True)
    progress = train(root, train={"train_iters": 3})
    assert "train.compile=auto: not compiled, since torch.compile fails here: no such compiler" in progress.lines
    with pytest.raises(ConfigError, match="no such compiler"):
        train(root, train={"train_iters": 3, "compile": "always"}, checkpoint={"save": str(root / "other")})
