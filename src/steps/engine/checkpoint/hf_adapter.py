"""Hugging Face PEFT adapters (LoRA, DoRA) as directories.

    adapter_config.json         see shapes/hf_adapter_config.py
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight            [r, in]
                                base_model.model.<module>.lora_B.weight            [out, r]
                                base_model.model.<module>.lora_magnitude_vector    [out], DoRA's

<module> is the full name of a linear in the Hugging Face model. A tensor under any other name is passed over by peft
with a mere warning: what is computed then is the base model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from steps.artifacts.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL
from steps.engine.checkpoint.dcp import damaged
from steps.engine.checkpoint.hf import write_safetensors
from steps.engine.checkpoint.lazy import lazy
from steps.engine.progress import SILENT, Progress
from steps.errors import ArtifactError, Problem
from steps.shapes import hf_adapter_config
from steps.shapes.hf_adapter_config import AdapterConfig

PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# Early releases of peft kept the magnitude in a module of its own.
_SUFFIXES = {f".{A}": A, f".{B}": B, f".{MAGNITUDE}": MAGNITUDE, f".{MAGNITUDE}.weight": MAGNITUDE}


@dataclass(frozen=True)
class Update:
    """scale * b @ a, the update of one linear that is not fused.

    a: [r, in], b: [out, r].   magnitude: [out], DoRA's; None for plain low-rank updates. Any dtype.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def tensors(self) -> dict[str, Tensor]:
        """By the last part of their names on disk."""
        magnitude = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {A: self.a, B: self.b, **magnitude}

    def to(self, dtype: torch.dtype) -> Update:
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype), magnitude=magnitude)

    def padded(self, rank: int) -> Update:
        """The same update with zero rows of a and zero columns of b up to `rank`."""
        more = rank - self.rank
        return replace(self, a=F.pad(self.a, (0, 0, 0, more)), b=F.pad(self.b, (0, more)))

    def folded(self) -> Update:
        """The same update with its scale in b, rounded once in float32."""
        wide = self.to(torch.float32)
        return replace(wide, b=wide.b * self.scale, scale=1.0)


@dataclass(frozen=True)
class HFAdapter:
    """An adapter in memory. config: adapter_config.json. updates: by the module's full name."""

    config: Mapping[str, Any]
    updates: Mapping[str, Update]

    def tensors(self) -> dict[str, Tensor]:
        """What adapter_model.safetensors holds, by name."""
        return {
            f"{PREFIX}{module}.{name}": tensor
            for module, update in self.updates.items()
            for name, tensor in update.tensors().items()
        }


def uniform(updates: Mapping[str, Update]) -> dict[str, Update]:
    """The same updates, all of one rank and one scale: unchanged where they are; otherwise padded with zeros to the
    largest rank, their scales folded into b. vLLM knows one rank and one alpha for all modules."""
    rank = max(1, *(update.rank for update in updates.values()))
    if len({update.scale for update in updates.values()}) > 1:
        updates = {module: update.folded() for module, update in updates.items()}
    return {module: update.padded(rank) if update.rank < rank else update for module, update in updates.items()}


def write(directory: Path, adapter: HFAdapter, progress: Progress = SILENT) -> None:
    """Write the two files into `directory`, which exists."""
    tensors = {name: lazy(tensor) for name, tensor in adapter.tensors().items()}
    with progress.task("write adapter", sum(tensor.nbytes for tensor in tensors.values()) / 1e6, "MB") as task:
        write_safetensors(directory / ADAPTER_MODEL, tensors, task)
    text = json.dumps(dict(adapter.config), indent=2, sort_keys=True) + "\n"
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def read(path: Path) -> HFAdapter:
    """The adapter in a directory, whoever wrote it.

    Raises ArtifactError: damaged_artifact; unsupported_adapter for what says more, or other, than LoRA and DoRA do.
    """
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path / ADAPTER_CONFIG, error) from error
    settings = hf_adapter_config.read(config, str(path / ADAPTER_CONFIG))
    try:
        tensors = load_file(path / ADAPTER_MODEL)
    except (SafetensorError, OSError) as error:
        raise damaged(path / ADAPTER_MODEL, error) from error
    return HFAdapter(config, _updates(tensors, settings, path / ADAPTER_MODEL))


def _updates(tensors: Mapping[str, Tensor], settings: AdapterConfig, file: Path) -> dict[str, Update]:
    modules: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(PREFIX):
            form = f"{PREFIX}<module>.{{{A}, {B}, {MAGNITUDE}}}"
            problems.append(unsupported(f"{file}: {name}", "is no tensor of a LoRA on a linear", form))
        else:
            modules.setdefault(name.removeprefix(PREFIX).removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor
    wanted = {A, B, MAGNITUDE} if settings.use_dora else {A, B}
    for module, found in modules.items():
        if odd := set(found) ^ wanted:
            name = min(odd)
            what = f"has {'no' if name in wanted else 'a'} {name}"
            what += "" if name in wanted else ", but use_dora is false in adapter_config.json"
            problems.append(Problem(where=f"{file}: {module}", what=what, name="damaged_artifact"))
        elif misfit := _misfit(found, settings.rank(module)):
            problems.append(Problem(where=f"{file}: {module}", what=misfit, name="damaged_artifact"))
    if not modules and not problems:
        problems.append(Problem(where=str(file), what="holds no tensors", name="damaged_artifact"))
    if len(problems) > 3:  # usually all for one reason
        problems[3:] = [Problem(where=str(file), what=f"{len(problems) - 3} more modules or tensors like these")]
    if problems:
        raise ArtifactError(problems)
    return {
        module: Update(found[A], found[B], settings.scale(module), found.get(MAGNITUDE))
        for module, found in modules.items()
    }


def _misfit(found: Mapping[str, Tensor], rank: int) -> str:
    """What keeps the tensors of one module from being multiplied at the rank that its configuration says."""
    a, b, magnitude = found[A], found[B], found.get(MAGNITUDE)
    if a.ndim != 2 or b.ndim != 2 or (len(a), b.shape[1]) != (rank, rank):
        shapes = f"{A} {list(a.shape)} and {B} {list(b.shape)}"
        return f"{shapes} are not of rank {rank}, which adapter_config.json says"
    if magnitude is not None and magnitude.shape != (len(b),):
        return f"{MAGNITUDE} {list(magnitude.shape)} does not fit {B} {list(b.shape)}"
    return ""


def unsupported(where: str, what: str, allowed: str = "", hint: str = "") -> Problem:
    """The fault of an adapter that is whole, and more than can be taken over."""
    return Problem(where=where, what=what, allowed=allowed, hint=hint, name="unsupported_adapter")
