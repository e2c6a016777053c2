from __future__ import annotations

from types import SimpleNamespace

import pytest

from steps.config.training import Optimizer, Scheduler
from steps.engine.train.schedule import learning_rate


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "decay"), [(0, None), (5, None), (0, 12), (7, 12), (1, 40)])
def test_rates_are_those_of_megatrons_scheduler(style, warmup, decay):
    pytest.importorskip("megatron.core")
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    train_iters = 20
    group = {"lr": 0.0, "weight_decay": 0.0, "params": []}
    optimizer = SimpleNamespace(param_groups=[group])
    theirs = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=3e-4, min_lr=2e-5, lr_warmup_steps=warmup, lr_decay_steps=decay or train_iters,
        lr_decay_style=style, start_wd=0.0, end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    settings = Optimizer(lr=3e-4, min_lr=2e-5)
    scheduler = Scheduler(lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=decay)
    for iteration in range(1, train_iters + 1):
        assert learning_rate(iteration, settings, scheduler, train_iters) == pytest.approx(group["lr"], rel=1e-12)
        theirs.step(1)
