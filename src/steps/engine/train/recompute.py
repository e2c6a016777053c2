"""What `train.recompute_granularity=auto` comes to on the machine of the run, by the estimate of its memory."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from steps import machine
from steps.engine.data.shards import PackedSplit
from steps.engine.progress import Progress
from steps.engine.train.distributed import World
from steps.engine.train.plan import Plan
from steps.engine.train.precision import compute_dtype
from steps.shapes.estimate import Batch, Choice, Estimate
from steps.shapes.model_config import ModelConfig


def settled(
    plan: Plan, shape: ModelConfig, split: PackedSplit, here: World, progress: Progress
) -> tuple[Plan, Estimate]:
    """The plan with "full" or None instead of auto, the same on every process, and the estimate it was decided by.

    A process for which even the smaller estimate is too much is warned of, and starts: an estimate may be wrong.
    """
    on_gpu = here.device.type == "cuda"
    dtype = str(compute_dtype(plan.train.precision, shape.params_dtype, here.device)).removeprefix("torch.")
    # Of data without a record its first row has to stand for the others.
    batch = Batch(plan.facts.get("pack_size") or len(split[0].input_ids), plan.train.micro_batch_size)
    estimate = Estimate.of(plan.peft, shape, dtype, batch, on_gpu=on_gpu)
    asked, where = plan.train.recompute_granularity, " on the GPU" if on_gpu else ""
    choice = here.same(Choice.of(estimate, asked, _available(here), plan.peft, batch, where))
    if choice.reason:
        progress.log(f"train.recompute_granularity={choice.reason}")
    if choice.warning:
        progress.log(f"warning: {choice.warning}")
    granularity = "full" if choice.recompute else None
    return replace(plan, train=plan.train.model_copy(update={"recompute_granularity": granularity})), estimate


def _available(here: World) -> int | None:
    """Bytes that this process can have in all, what it has already included."""
    if here.device.type == "cuda":
        return torch.cuda.mem_get_info(here.device)[0]
    free = machine.available_bytes()
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + machine.own_bytes()
