"""Train all weights of a model: packed_parquet and checkpoint_megatron in, checkpoint_megatron out."""

from __future__ import annotations

from steps import runtime
from steps.engine.train.finetune import finetune, probe
from steps.runtime.figures import probed
from steps.sft.megatron_bridge.schema import Config

_REPORTED = (
    "iteration", "loss_first", "loss_last", "valid_loss_first", "valid_loss_last", "parameters", "trainable_parameters",
    "base_fingerprint",
)  # fmt: skip


def run(job: runtime.Job[Config]) -> None:
    """Train, or try a few steps of it."""
    plan = job.config.plan(job.inputs)
    if job.probe:
        job.summary(**probed(probe(plan, job.progress)))
        return
    result = finetune(plan, job.record("checkpoint.save"), job.progress)
    reported = {name: value for name, value in result.facts.items() if name in _REPORTED}
    job.summary(checkpoint=job.config.checkpoint.save, **reported, tokens_per_second=result.tokens_per_second)


if __name__ == "__main__":
    runtime.main(run)
