"""`steps run --probe`, in real processes: what it tells, that it leaves nothing behind, and where it is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.packed import PACK_SIZE, random_rows, write_base, write_packed
from support.steps import steps

SETTINGS = (
    "dataset.nano3_packed_sft_dir=packed", "checkpoint.pretrained_checkpoint=base", f"recipe.seq_length={PACK_SIZE}",
    "checkpoint.save=lora", "peft.dim=4", "train.train_iters=40",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(16), random_rows(2, seed=9))
    (path / "tmp").mkdir()
    return path


def probe(root: Path, *arguments: str):
    return steps(
        "run", "peft/megatron_bridge", "-c", "tiny", *SETTINGS, *arguments, "--probe", cwd=root,
        env={"TMPDIR": str(root / "tmp")},
    )  # fmt: skip


def everything(root: Path) -> set[str]:
    return {os.fspath(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("processes", [1, 2])
def test_it_measures_and_leaves_nothing(root, processes):
    before = everything(root)
    done = probe(root, f"run.env.nprocs_per_node={processes}", "logger.tensorboard_dir=events")
    assert (done.returncode, done.stderr) == (0, "")
    assert everything(root) == before
    *_, title, speed, seconds, memory, time = done.stdout.splitlines()
    assert title == "peft/megatron_bridge probed; nothing was written"
    assert re.fullmatch(r"  tokens per second: [\d,.]+", speed)
    assert re.fullmatch(r"  seconds per step: [\d.]+", seconds)
    assert re.fullmatch(r"  peak memory: [\d.]+ MB, \d\.\d\d of the [\d.]+ MB expected", memory)
    assert re.fullmatch(r"  time to finish: .+ for 40 steps, evaluations and saves apart", time)


def test_what_is_left_of_a_run(root):
    """And the run itself is not touched: it is there to the byte, and goes on."""
    run = ("run", "peft/megatron_bridge", "-c", "tiny", *SETTINGS, "checkpoint.save=other", "train.train_iters=3")
    assert steps(*run, cwd=root).returncode == 0
    before = {path: path.read_bytes() for path in (root / "other").rglob("*") if path.is_file()}
    done = probe(root, "checkpoint.save=other", "train.train_iters=5")
    assert " for 2 steps, " in done.stdout, done.stderr
    assert {path: path.read_bytes() for path in (root / "other").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("settings", [("peft.type=qr_adaptor", "peft.ranks=[2,4]"), ("peft.init_lora_weights=eva",)])
def test_methods_that_look_at_data_first(root, settings):
    before = everything(root)
    settings = [*settings, *(["~peft.dim", "~peft.alpha"] if "qr" in settings[0] else [])]
    done = probe(root, *settings)
    assert "time to finish" in done.stdout, done.stdout + done.stderr
    assert everything(root) == before


def test_a_failure_is_told_as_in_a_run(root):
    before = everything(root)
    done = probe(
        root, "optimizer.lr=1e30", "optimizer.min_lr=1e30", "optimizer.clip_grad=0", "scheduler.lr_warmup_iters=0"
    )
    assert done.returncode == 1
    assert "non_finite_loss" in done.stdout + done.stderr
    assert everything(root) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-d"], 2, "--probe and -d exclude each other"),
        (["-b", "local"], 2, "--probe and -b exclude each other"),
        (["--upstream"], 2, "--probe and --upstream exclude each other"),
        (
            ["-r", "lepton_peft_megatron_bridge", "train.global_batch_size=8"],
            2,
            "runs its jobs with lepton, but --probe runs here",
        ),
        (["engine=megatron_bridge", "recipe._target_=a.b"], 2, "cannot be probed: Megatron-Bridge trains"),
        (["peft.dmi=3"], 3, "peft.dmi: unknown key"),
        (["checkpoint.pretrained_checkpoint=nowhere"], 4, "nowhere"),
    ],
)
def test_refused_with_a_reason(root, arguments, code, message):
    before = everything(root)
    done = probe(root, *arguments)
    assert message in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    assert everything(root) == before


def test_a_step_without_anything_to_try(tmp_path):
    done = steps("run", "data_prep/demo_chat", "-c", "tiny", "--probe", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "data_prep/demo_chat cannot be probed: it has no part that could be tried by itself" in done.stderr
    assert list(tmp_path.iterdir()) == []
