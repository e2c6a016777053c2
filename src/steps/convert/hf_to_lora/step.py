"""An adapter in Hugging Face's PEFT format to one of ours, for the same base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from steps import runtime
from steps.convert.hf_to_lora.schema import Config
from steps.engine.adapters.base import create
from steps.engine.checkpoint import hf_adapter, megatron
from steps.engine.checkpoint.adapter_config import adapter_run_config
from steps.engine.checkpoint.hf_to_lora import convert
from steps.runtime import Job
from steps.shapes.run_config import model_config

_MAIN = ("dim", "alpha", "target_modules")


def run(job: Job[Config]) -> None:
    """Read, lay out in Megatron's names, write."""
    config, log = job.config, job.progress.log
    source, base_facts = job.inputs["hf_adapter_path"], job.inputs["base_megatron_path"].facts
    path, base_dir = Path(config.hf_adapter_path).expanduser(), Path(config.base_megatron_path).expanduser()
    base = megatron.Checkpoint.open(base_dir)
    model = model_config(base.run_config, str(base.folder / megatron.RUN_CONFIG))

    def row_norms(linear: str) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(base.read(f"{linear}.weight").float(), dim=1)
        return norms

    adapter = hf_adapter.read(path)
    name = adapter.config.get("base_model_name_or_path")
    if name and not source.facts:
        log(f"warning: nothing but shapes tells that {name}, its base, is {config.base_megatron_path}")
    done = convert(adapter, model, row_norms, config.hf_adapter_path)
    for note in done.notes:
        log(note)
    section, bridge_class = done.section, create(done.section, model).bridge_class
    with job.produce("lora_checkpoint") as out:
        megatron.write(
            out.path,
            done.tensors,
            num_layers=model.num_layers,
            run_config=adapter_run_config(base.run_config, section, bridge_class, base_dir),
            progress=job.progress,
        )
        said = section.model_dump()
        digests = {
            key: source.facts[key] for key in ("tokenizer_digest", "chat_template_digest") if key in source.facts
        }
        known = {key: base_facts[key] for key in ("base_fingerprint",) if key in base_facts}
        out.facts.update(
            **known, **digests, method=section.type, peft=said, **{key: said[key] for key in _MAIN},
            base_model_name_or_path=name, iteration=0, finished=True,
            trainable_parameters=sum(tensor.numel() for tensor in done.tensors.values()),
        )  # fmt: skip
    job.summary(
        method=section.type, **{key: said[key] for key in _MAIN}, modules=len(adapter.updates),
        parameters=out.facts["trainable_parameters"], lora_checkpoint=config.lora_checkpoint,
    )  # fmt: skip


if __name__ == "__main__":
    runtime.main(run)
