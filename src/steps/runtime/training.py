"""What the training steps do alike: hand the work to the engine that the configuration chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from steps.artifacts.record import digest_files
from steps.runtime.figures import probed

if TYPE_CHECKING:
    from steps.engine.train.engines import EngineConfig
    from steps.runtime import Job

Run = TypeVar("Run", bound="EngineConfig")


def train(job: Job[Run]) -> None:
    """Train into checkpoint.save, or where it is a probe try a few steps and write nothing."""
    if job.probe:
        _probe(job)
    elif job.config.chosen_engine == "megatron_bridge":
        _megatron_bridge(job)
    else:
        _torch(job)


def _torch(job: Job[Run]) -> None:
    from steps.engine.train.finetune import finetune

    result = finetune(job.config.plan(job.inputs), job.record("checkpoint.save"), job.progress)
    job.summary(checkpoint=job.config.checkpoint.save, **result.told())


def _probe(job: Job[Run]) -> None:
    from steps.engine.train.finetune import probe

    job.summary(**probed(probe(job.config.plan(job.inputs), job.progress)))


def _megatron_bridge(job: Job[Run]) -> None:
    from steps.engine import megatron_bridge

    plan, record = job.config.plan(job.inputs), job.record("checkpoint.save")
    adapts = plan.peft is not None
    megatron_bridge.finetune(
        job.resolved, packed_dir=plan.packed_dir, base=plan.base_dir, progress=job.progress, adapts=adapts
    )
    if job.is_main:
        record.facts.update({**plan.record_facts(), **megatron_bridge.facts(plan.save_dir, adapts=adapts)})
        record.digest, record.files = digest_files(plan.save_dir)
        record.write(plan.save_dir)
        job.summary(checkpoint=str(plan.save_dir), iteration=record.facts["iteration"])
