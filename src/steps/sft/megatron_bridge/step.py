"""Train all weights of a model: packed_parquet and checkpoint_megatron in, checkpoint_megatron out."""

from __future__ import annotations

from steps import runtime
from steps.engine.train.finetune import finetune, probe
from steps.runtime.figures import probed
from steps.sft.megatron_bridge.schema import Config


def run(job: runtime.Job[Config]) -> None:
    """Train, or try a few steps of it."""
    plan = job.config.plan(job.inputs)
    if job.probe:
        job.summary(**probed(probe(plan, job.progress)))
        return
    result = finetune(plan, job.record("checkpoint.save"), job.progress)
    job.summary(checkpoint=job.config.checkpoint.save, **result.told())


if __name__ == "__main__":
    runtime.main(run)
