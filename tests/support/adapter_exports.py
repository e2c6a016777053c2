"""Adapter checkpoints on small Hugging Face models, as training leaves them behind, and their exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steps.artifacts.record import Record, digest_files
from steps.engine.adapters import base
from steps.engine.checkpoint import hf, mapping, megatron
from steps.engine.checkpoint.adapter_config import adapter_run_config
from steps.engine.checkpoint.convert import hf_to_megatron
from steps.engine.model.decoder import Decoder, load_weights
from steps.shapes.targets import chosen
from support.adapters import section, shake
from support.models import save_hf

#: One of each way in which an adapter can lie over a model.
CASES: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "dim": 4, "alpha": 6},
    "rslora": {"type": "lora", "dim": 3, "alpha": 7, "use_rslora": True},
    "pissa": {"type": "lora", "dim": 4, "alpha": 6, "init_lora_weights": "pissa"},
    "lora-some": {"type": "lora", "dim": 4, "alpha": 6, "target_modules": ["*.layers.1.*", "*.layers.0.*.linear_qkv"]},
    "lora-kinds": {"type": "lora", "dim": 4, "alpha": 6, "target_modules": ["linear_proj", "linear_fc2"]},
    "lora-bf16": {"type": "lora", "dim": 4, "alpha": 6, "lora_dtype": "bfloat16"},
    "canonical": {"type": "canonical_lora", "dim": 4, "alpha": 6},
    "canonical-some": {"type": "canonical_lora", "dim": 4, "target_modules": ["q_proj", "v_proj", "*.layers.2.*up"]},
    "dora": {"type": "dora", "dim": 4, "alpha": 6},
    "dora-some": {"type": "dora", "dim": 4, "alpha": 6, "target_modules": ["*.layers.2.*", "linear_fc1"]},
}


@dataclass(frozen=True)
class Trained:
    """A Hugging Face model at `root`/source, its base at `root`/base, an adapter for it at `root`/lora."""

    root: Path
    adapters: base.Adapters

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """What the adapted decoder computes over one document, [tokens, vocab] float32."""
        with torch.no_grad():
            return self.adapters.decoder.eval()(ids, [0, len(ids)])


def ids(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed))


def write_base(root: Path, family: str, **overrides: Any) -> hf.Source:
    """`root`/source and `root`/base, with a record."""
    save_hf(root / "source", family, **overrides)
    source = hf.open_source(str(root / "source"))
    done = hf_to_megatron(source, root / "base")
    digest, files = digest_files(root / "base")
    Record(type="checkpoint_megatron", digest=digest, files=files, facts=done.facts()).write(root / "base")
    return source


def trained(root: Path, family: str, case: Mapping[str, Any], **facts: Any) -> Trained:
    """A random model and a moved adapter on it, both saved. facts: of the adapter's record, over the usual ones."""
    source = write_base(root, family)
    checkpoint = megatron.Checkpoint.open(root / "base")
    decoder = Decoder(source.config)
    load_weights(decoder, ((n, t.load()) for n, t in mapping.to_megatron(source.config, source.tensors).items()))
    settings = section(case)
    method = base.create(settings, source.config)
    adapters = base.attach(decoder, method, chosen(settings, source.config.num_layers), 3)
    shake(adapters)
    megatron.write(
        root / "lora",
        adapters.tensors(),
        num_layers=source.config.num_layers,
        run_config=adapter_run_config(checkpoint.run_config, settings, method.bridge_class, root / "base"),
        iteration=7,
    )
    from steps.artifacts.record import read

    known = read(root / "base")
    told = {
        "base_fingerprint": known.facts["base_fingerprint"], "method": settings.type, "dim": settings.dim,
        "alpha": settings.alpha, "target_modules": settings.target_modules, "peft": settings.model_dump(),
        "iteration": 7, "finished": True, **facts,
    }  # fmt: skip
    digest, files = digest_files(root / "lora")
    Record(type="checkpoint_lora", digest=digest, files=files, facts=told).write(root / "lora")
    return Trained(root, adapters)
