"""An adapter of ours to one that peft and vLLM load, loaded back before it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steps import runtime
from steps.artifacts.opening import is_hub_id
from steps.convert.lora_to_hf.schema import Config, without_factors
from steps.engine.adapters import load_back
from steps.engine.adapters.base import create
from steps.engine.checkpoint import hf_adapter, megatron
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.checkpoint.hf import Source, open_source
from steps.engine.checkpoint.lora_to_hf import export
from steps.engine.checkpoint.merge import open_adapter
from steps.errors import ArtifactError
from steps.runtime import Job
from steps.shapes.run_config import model_config
from steps.shapes.targets import linear_names

# What the adapter's record says and stays true of the same adapter in another format.
_FACTS = (
    "base_fingerprint", "tokenizer_digest", "chat_template_digest", "method", "dim", "alpha", "target_modules",
    "exclude_modules", "peft", "iteration", "finished", "trainable_parameters",
)  # fmt: skip


def run(job: Job[Config]) -> None:
    """Export, write, load back and compare, publish."""
    config, log = job.config, job.progress.log
    facts = job.inputs["lora_checkpoint"].facts
    adapter = open_adapter(Path(config.lora_checkpoint).expanduser())
    folder = adapter.checkpoint.folder
    method = create(adapter.section, model_config(adapter.checkpoint.run_config, str(folder / megatron.RUN_CONFIG)))
    if not method.section.has_factors:
        raise ArtifactError(without_factors(type(method.section), "lora_checkpoint"))
    name = config.base_hf_path or facts.get("base_model_name_or_path")
    exported = export(adapter, method.factors, method.model, name)
    codes = {spec.type for linear in linear_names(method.model.num_layers) if (spec := method.section.held(linear))}
    for warning in config.warnings(facts, codes, exported.config["use_dora"]):
        log(f"warning: {warning}")
    base = base_of(config, log)
    with job.produce("output_hf_path") as out:
        hf_adapter.write(out.path, exported, job.progress)
        load_back.check_names(out.path, exported)
        if base is not None:
            load_back.same_shape(adapter, method, base)
            key = "base_hf_path" if config.base_megatron_path is None else "base_megatron_path"
            done = load_back.check(
                out.path,
                exported,
                adapter,
                method,
                base,
                base_fingerprint=facts.get("base_fingerprint"),
                recorded_fingerprint=job.inputs[key].facts.get("base_fingerprint"),
            )
            log(str(done))
        told = {key: exported.config[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
        kept = {key: facts[key] for key in _FACTS if key in facts}
        out.facts.update(kept, hf=dict(exported.config), checked=base is not None)
    parameters = sum(tensor.numel() for tensor in exported.tensors().values())
    job.summary(**told, modules=len(exported.updates), parameters=parameters, output_hf_path=config.output_hf_path)


def base_of(config: Config, log: Callable[[str], None]) -> Source | None:
    """The base to check with; None, with a warning, where none is given or at hand."""
    reason = "no base is given (base_megatron_path or base_hf_path)"
    if config.base_megatron_path is not None:
        return megatron_source(Path(config.base_megatron_path).expanduser())
    if config.base_hf_path is not None:
        try:
            return open_source(config.base_hf_path)
        except ArtifactError as error:
            if not is_hub_id(config.base_hf_path):
                raise
            reason = str(error).partition(". ")[0]
    log(f"warning: names and tensors are checked, logits are not: {reason}")
    return None


if __name__ == "__main__":
    runtime.main(run)
