"""The expected peak of `steps run … -d` against what the kernel counts in the run itself.

Two models, LoRA of rank 16 on all linears, packed rows of 2,048 tokens, by precision, recomputation and rows at a time.
Measured is the largest resident set (VmHWM) of any process of the command: that of the step. Bytes are no matter of
luck, so each run is made once, for a few optimizer steps of two rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

from benchmarks import inputs
from benchmarks.side_by_side import STEPS, table, timed

ITERS = 3
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    packed = inputs.packed(options.work)
    rows, ratios = [], []
    every = itertools.product(inputs.MODELS.items(), ("float32", "bfloat16"), ("null", "full"), (1, 2))
    for (name, make), precision, recompute, micro in every:
        settings = [
            f"dataset.nano3_packed_sft_dir={packed}", f"checkpoint.pretrained_checkpoint={make(options.work)[0]}",
            f"train.precision={precision}", f"train.recompute_granularity={recompute}",
            f"train.micro_batch_size={micro}",
        ]  # fmt: skip
        expected, measured = _pair(options.work, settings)
        ratios.append(measured / expected)
        cells = [name, precision, recompute, str(micro), _mb(expected), _mb(measured), f"{ratios[-1]:.2f}"]
        print(" | ".join(cells), flush=True)
        rows.append(cells)
    within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    head = ("model", "precision", "recomputation", "rows at a time", "expected", "measured", "measured / expected")
    return (
        "## Memory estimate\n\nThe peak that `steps run … -d` expects, against the largest resident set of the run: "
        f"LoRA, rank 16 on all linears, rows of {inputs.PACK_SIZE:,} tokens, {ITERS} optimizer steps of two rows, one "
        "thread. "
        f"**Within 15 %: {within} of {len(ratios)}** (ratios {min(ratios):.2f} to {max(ratios):.2f}).\n\n"
        + table(rows, head)
    )


def _pair(work: Path, settings: list[str]) -> tuple[int, int]:
    """Bytes: expected by a dry run, measured of the run."""
    shutil.rmtree(work / "lora", ignore_errors=True)
    command = [
        STEPS, "run", "peft/megatron_bridge", "-c", "tiny", "checkpoint.save=lora",
        f"recipe.seq_length={inputs.PACK_SIZE}", "peft.dim=16", "train.global_batch_size=2",
        f"train.train_iters={ITERS}", "train.eval_iters=0", "scheduler.lr_warmup_iters=0", *settings,
    ]  # fmt: skip
    told = json.loads(timed([*command, "-d", "--json"], work, ENVIRONMENT).output)
    return told["steps"][0]["account"]["memory_bytes"], timed(command, work, ENVIRONMENT).peak_bytes


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
