"""Hugging Face or GGUF weights to a Megatron-Core torch_dist checkpoint."""

from __future__ import annotations

from steps import runtime
from steps.convert.common import tokenizer_facts, tokenizer_of
from steps.convert.hf_to_megatron.schema import Config
from steps.engine.checkpoint.convert import hf_to_megatron, megatron_differences
from steps.engine.checkpoint.fingerprint import verify
from steps.engine.checkpoint.hf import open_source
from steps.runtime import Job


def run(job: Job[Config]) -> None:
    """Convert, tensor by tensor."""
    log = job.progress.log
    source = open_source(job.config.hf_model_id).cast(job.config.dtype)
    tokenizer = tokenizer_of(source.path, log)
    for difference in megatron_differences(source.config):
        log(f"warning: {difference}; the torch engine here computes it as the model says")
    with job.produce("megatron_path") as out:
        done = hf_to_megatron(source, out.path, tokenizer.save if tokenizer else None, job.progress)
        facts = job.inputs["hf_model_id"].facts
        if done.config.params_dtype == facts.get("dtype"):  # a cast makes other weights of them
            verify(done.fingerprint, facts.get("base_fingerprint"), source.path)
        out.facts.update(done.facts(), **tokenizer_facts(tokenizer))
    job.summary(**done.summary(), megatron_path=job.config.megatron_path)


if __name__ == "__main__":
    runtime.main(run)
