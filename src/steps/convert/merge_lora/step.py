"""Adapter and base to one Hugging Face model, ready to serve."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from steps import runtime
from steps.convert.common import tokenizer_facts, tokenizer_of
from steps.convert.merge_lora.schema import Config
from steps.engine.adapters.base import create
from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.hf import open_directory, open_source
from steps.engine.checkpoint.merge import merge, open_adapter
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.evaluation.answers import Prompt, answers, stop_tokens
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.model.quantization import as_held
from steps.errors import ArtifactError
from steps.runtime import Job
from steps.shapes.targets import linear_names


def run(job: Job[Config]) -> None:
    """Merge tensor by tensor, then let the merged model speak."""
    config, log = job.config, job.progress.log
    facts = job.inputs["lora_checkpoint"].facts
    base_key = "base_hf_path" if config.base_megatron_path is None else "base_megatron_path"
    if config.base_megatron_path is not None:
        base = megatron_source(Path(config.base_megatron_path).expanduser())
    else:
        base = open_source(str(config.base_hf_path))
    adapter = open_adapter(Path(config.lora_checkpoint).expanduser())
    method = create(adapter.section, base.config)
    tokenizer = tokenizer_of(base.path, log)
    for warning in config.warnings(facts, tokenizer_facts(tokenizer)):
        log(f"warning: {warning}")
    codes = {spec.type for name in linear_names(base.config.num_layers) if (spec := method.section.held(name))}
    if problems := list(config.check_base(codes or None)):
        raise ArtifactError(problems)
    if codes:
        log(config.told(" and ".join(sorted(codes))))
    with job.produce("output_hf_path") as out:
        done = merge(
            base,
            adapter,
            method.merge,
            out.path,
            base_fingerprint=facts.get("base_fingerprint"),
            recorded_fingerprint=job.inputs[base_key].facts.get("base_fingerprint"),
            held=partial(as_held, method.section.held) if config.merge_into == "dequantized" else None,
            progress=job.progress,
        )
        if tokenizer is not None:
            tokenizer.save(out.path)
        out.facts.update(
            done.facts(), **tokenizer_facts(tokenizer), merged=dict(adapter.section), merge_into=config.merge_into
        )
    job.summary(**done.summary(), merged_linears=len(adapter.linears), output_hf_path=config.output_hf_path)
    if config.sample_prompt is not None and tokenizer is not None:
        answer = ask(Path(config.output_hf_path).expanduser(), tokenizer, config.sample_prompt, config.sample_tokens)
        log(f"{config.sample_prompt} -> {answer}")
        job.summary(sample_prompt=config.sample_prompt, sample_answer=answer)


def ask(path: Path, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    """What the model at `path` answers, loaded back from disk."""
    source = open_directory(path)
    decoder = Decoder(source.config)
    load_weights(decoder, ((k, v.load()) for k, v in mapping.to_megatron(source.config, source.tensors).items()))
    asked = Prompt([{"role": "user", "content": prompt}], None, None)
    stop = stop_tokens(tokenizer, source)
    (answer,) = answers(decoder, tokenizer, [asked], stop, max_new_tokens=max_new_tokens)
    return answer.text


if __name__ == "__main__":
    runtime.main(run)
