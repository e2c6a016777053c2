"""A sweep whose answer is known: data that a teacher of rank 4 wrote are learnt by rank 4, and by no less."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from support.packed import PACK_SIZE, random_decoder, write_base, write_packed

from steps.config import yaml12
from steps.engine.model.generate import Sampling, generate

pytest.importorskip("matplotlib", reason="extra report")

LINEAR, RANK, TEXTS, HELD_OUT = "decoder.layers.1.mlp.linear_fc2", 4, 600, 100


def teacher():
    """The base with four orthogonal directions of one linear moved, each as far as the others."""
    decoder, generator = random_decoder(), torch.Generator().manual_seed(5)
    weight = decoder.weights()[f"{LINEAR}.weight"]
    left, right = (torch.linalg.qr(torch.randn(size, RANK, generator=generator))[0] for size in weight.shape)
    with torch.no_grad():
        weight += 3 * left @ right.T
    return decoder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    write_base(path / "base", true=True)
    starts = [[number % 61] for number in range(TEXTS)]
    sampled = generate(teacher(), starts, PACK_SIZE - 1, sampling=Sampling(temperature=1.0, seed=1))
    mask = [1] * (PACK_SIZE - 1) + [0]
    rows = [
        {"input_ids": start + rest, "loss_mask": mask, "seq_start_id": [0]}
        for start, rest in zip(starts, sampled, strict=True)
    ]
    write_packed(path / "packed", rows[HELD_OUT:], rows[:HELD_OUT])
    return path, rows[:HELD_OUT]


@torch.no_grad()
def loss_of(decoder, rows) -> float:
    """Mean over all tokens: what remains for the teacher itself is the chance in its own draws."""
    losses = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logits = decoder(ids, [0, len(ids)])[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
    return sum(losses) / len(losses)


def test_quality_saturates_at_the_teachers_rank(inputs, tmp_path):
    path, held_out = inputs
    config = {
        "recipe": {"seq_length": PACK_SIZE},
        "dataset": {"nano3_packed_sft_dir": str(path / "packed")},
        "train": {
            "train_iters": 300, "global_batch_size": 10, "micro_batch_size": 10, "eval_interval": 0, "eval_iters": 10,
        },
        "optimizer": {"weight_decay": 0.0},
        "scheduler": {"lr_warmup_iters": 5},
        "peft": {"type": "lora", "target_modules": ["*.layers.1.*.linear_fc2"]},
        "checkpoint": {"pretrained_checkpoint": str(path / "base"), "save": "runs", "save_interval": 1000},
        "variants": [
            {"name": f"r{rank}", "set": [f"peft.dim={rank}", f"peft.alpha={rank}"]} for rank in (1, 2, 4, 8)
        ],
        "lr_grid": [0.02],
        "parallel": 2,
        "output_dir": "report",
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml12.dump(config))
    command = [sys.executable, "-m", "steps", "run", "peft/compare", "-c", "sweep.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    loss = {row["dim"]: row["valid_loss"]["mean"] for row in report["variants"]}
    floor = loss_of(teacher(), held_out)
    # The base is 0.11 above the teacher. Each direction that is missing costs about 0.03.
    assert report["base_loss"] - floor == pytest.approx(loss_of(random_decoder(), held_out) - floor, abs=1e-4)
    assert loss[1] - loss[2] > 0.015
    assert loss[2] - loss[4] > 0.015
    assert abs(loss[4] - loss[8]) < 0.01
    assert loss[4] - floor < 0.02
    assert (tmp_path / "report" / "ranks_lora.png").exists()
