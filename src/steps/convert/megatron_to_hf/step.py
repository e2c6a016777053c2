"""A Megatron-Core torch_dist checkpoint to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from steps import runtime
from steps.convert.common import tokenizer_facts, tokenizer_of
from steps.convert.megatron_to_hf.schema import Config
from steps.engine.checkpoint.convert import described_by, megatron_source, to_hf_directory
from steps.engine.checkpoint.fingerprint import verify
from steps.runtime import Job


def run(job: Job[Config]) -> None:
    """Convert, tensor by tensor."""
    config = job.config
    source = megatron = megatron_source(Path(config.megatron_path).expanduser())
    tokenizer_path = megatron.path
    if config.hf_model_id is not None:
        source, tokenizer_path = described_by(megatron, config.hf_model_id)
    tokenizer = tokenizer_of(tokenizer_path, job.progress.log)
    with job.produce("hf_path") as out:
        done = to_hf_directory(source, out.path, progress=job.progress)
        verify(done.fingerprint, job.inputs["megatron_path"].facts.get("base_fingerprint"), megatron.path)
        if tokenizer is not None:
            tokenizer.save(out.path)
        out.facts.update(done.facts(), **tokenizer_facts(tokenizer))
    job.summary(**done.summary(), hf_path=config.hf_path)


if __name__ == "__main__":
    runtime.main(run)
