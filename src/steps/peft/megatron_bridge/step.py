"""Train adapters on a frozen base: packed_parquet and checkpoint_megatron in, checkpoint_lora out."""

from __future__ import annotations

from steps import runtime
from steps.artifacts.record import digest_files
from steps.peft.megatron_bridge.schema import Config
from steps.runtime.figures import probed


def run(job: runtime.Job[Config]) -> None:
    """Hand the work to the engine that the configuration chooses."""
    if job.probe:
        _probe(job)
    elif job.config.chosen_engine == "megatron_bridge":
        _megatron_bridge(job)
    else:
        _torch(job)


def _torch(job: runtime.Job[Config]) -> None:
    from steps.engine.train.finetune import finetune

    result = finetune(job.config.plan(job.inputs), job.record("checkpoint.save"), job.progress)
    job.summary(checkpoint=job.config.checkpoint.save, **result.told())


def _probe(job: runtime.Job[Config]) -> None:
    from steps.engine.train.finetune import probe

    job.summary(**probed(probe(job.config.plan(job.inputs), job.progress)))


def _megatron_bridge(job: runtime.Job[Config]) -> None:
    from steps.engine import megatron_bridge

    plan, record = job.config.plan(job.inputs), job.record("checkpoint.save")
    megatron_bridge.finetune(job.resolved, packed_dir=plan.packed_dir, base=plan.base_dir, progress=job.progress)
    if job.is_main:
        record.facts.update({**plan.facts, **megatron_bridge.facts(plan.save_dir)})
        record.digest, record.files = digest_files(plan.save_dir)
        record.write(plan.save_dir)
        job.summary(checkpoint=str(plan.save_dir), iteration=record.facts["iteration"])


if __name__ == "__main__":
    runtime.main(run)
