"""Our engine: the very run that `steps run peft/megatron_bridge` makes, one optimizer step a turn."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import steps.runtime  # noqa: F401  # what it sets for OpenMP and memory must be set before torch is loaded
from benchmarks.contenders.turns import Turns
from steps.artifacts.record import Record
from steps.config.peft.lora import LoRA
from steps.config.training import Checkpoint, Optimizer, Rng, Scheduler, Train
from steps.engine.progress import Silent
from steps.engine.train.finetune import finetune
from steps.engine.train.plan import Plan


class _End(Exception):
    pass


class _OneStepATurn(Silent):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def metrics(self, values: Mapping[str, float]) -> None:
        if "tokens" in values:
            self._turns.done(tokens=values["tokens"], loss=values["loss"])
            if not self._turns.asked():
                raise _End


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--rows", type=int, default=1, help="in a micro-batch")
    options = parser.parse_args()
    turns = Turns()
    if not turns.asked():
        return
    with tempfile.TemporaryDirectory() as place:
        plan = Plan(
            packed_dir=options.packed,
            base_dir=options.base,
            train=Train(
                train_iters=1000, global_batch_size=options.rows, micro_batch_size=options.rows, eval_interval=0,
                eval_iters=0, precision=options.precision,
                recompute_granularity="full" if options.recompute else None, compile=options.compile,
            ),
            optimizer=Optimizer(),
            scheduler=Scheduler(lr_decay_style="constant"),
            peft=LoRA(type="lora", dim=16, alpha=16),
            checkpoint=Checkpoint(
                pretrained_checkpoint=str(options.base), save=str(Path(place) / "lora"), save_interval=10000
            ),
            rng=Rng(seed=0),
        )  # fmt: skip
        with suppress(_End):
            finetune(plan, Record("checkpoint_lora"), _OneStepATurn(turns))


if __name__ == "__main__":
    main()
