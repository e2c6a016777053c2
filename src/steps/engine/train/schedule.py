"""The learning rate of each optimizer step: Megatron's OptimizerParamScheduler as a pure function."""

from __future__ import annotations

import math

from steps.config.training import Optimizer, Scheduler


def learning_rate(iteration: int, optimizer: Optimizer, scheduler: Scheduler, train_iters: int) -> float:
    """The rate that optimizer step `iteration` (from 1) uses.

    Megatron moves its scheduler after the step, so step 1 of a warmup has the rate 0, and the peak comes at step
    lr_warmup_iters + 1. Behind lr_decay_iters (default: train_iters) it stays at min_lr.
    """
    done, warmup = iteration - 1, scheduler.lr_warmup_iters
    if warmup and done <= warmup:
        return optimizer.lr * done / warmup
    if scheduler.lr_decay_style == "constant":
        return optimizer.lr
    decay = scheduler.lr_decay_iters or train_iters
    if done > decay:
        return optimizer.min_lr
    ratio = (done - warmup) / (decay - warmup)
    share = 1 - ratio if scheduler.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1)
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)
