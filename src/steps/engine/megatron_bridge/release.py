"""The installed Megatron-Bridge: what of it we use, found by import, with its differences between releases.

Megatron-Bridge 0.3 (the releases on PyPI) and the later sources inside NeMo containers differ in names. This is the
only file that knows modules of Megatron-Bridge by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from steps.errors import Problem, StepFailed

WHERE_TO_GET = (
    "Run the step in a NeMo container (nvcr.io/nvidia/nemo), or `pip install megatron-bridge` on a machine with CUDA; "
    "or use engine: torch."
)

_ADAPTERS = {
    "lora": ("megatron.bridge.peft.lora", "LoRA"),
    "dora": ("megatron.bridge.peft.dora", "DoRA"),
    "canonical_lora": ("megatron.bridge.peft.canonical_lora", "CanonicalLoRA"),
}
#: Newer name first: releases that have it keep the older one only as a deprecated alias.
_DATASETS = (
    ("megatron.bridge.data.builders", "GPTSFTDatasetConfig"),
    ("megatron.bridge.training.config", "FinetuningDatasetConfig"),
)
_SPECS = (
    ("megatron.bridge.data.packing", "PackedSequenceSpecs"),
    ("megatron.bridge.data.datasets.packed_sequence", "PackedSequenceSpecs"),
)


@dataclass(frozen=True)
class Release:
    """The parts of one release of Megatron-Bridge.

    adapters:      its adapter dataclass for each of our `peft.type`s.
    dataset:       its configuration class for fine-tuning data.
    specs:         its PackedSequenceSpecs.
    reads_parquet: it reads packed Parquet; releases without read one pickled .npy for each split.
    """

    version: str
    adapters: Mapping[str, type]
    dataset: type
    specs: type
    reads_parquet: bool


def missing_packages() -> list[Problem]:
    """Why Megatron-Bridge cannot run here: nothing of it is imported to find out, and torch is not either."""
    for package in ("megatron.core", "megatron.bridge"):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            name = package.replace(".", "-")
            return [
                Problem(
                    where="engine",
                    what=f"megatron_bridge needs the package {name}, which is not installed here",
                    hint=WHERE_TO_GET,
                    name="megatron_bridge_missing",
                )
            ]
    return []


def load() -> Release:
    """Import what is used of the installed release. Raises StepFailed naming the package that is missing."""
    if problems := missing_packages():
        raise StepFailed(problems)
    return Release(
        version=getattr(import_module("megatron.bridge"), "__version__", "unknown"),
        adapters={kind: _first((place,)) for kind, place in _ADAPTERS.items()},
        dataset=_first(_DATASETS),
        specs=_first(_SPECS),
        reads_parquet=importlib.util.find_spec("megatron.bridge.data.datasets.packed_parquet") is not None,
    )


def entry_points() -> tuple[Callable[..., None], Callable[..., Any]]:
    """Megatron-Bridge's `finetune` and the forward step of a decoder-only model that it wants."""
    finetune = import_module("megatron.bridge.training.finetune").finetune
    return finetune, import_module("megatron.bridge.training.gpt_step").forward_step


def import_module(name: str) -> Any:
    """Import, and tell a missing dependency of Megatron-Bridge by its name. Raises StepFailed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise StepFailed(
                f"Megatron-Bridge needs the package {error.name}, which is not installed here (importing {name})",
                hint=WHERE_TO_GET,
                name="megatron_bridge_missing",
            ) from error
        raise


def _first(places: tuple[tuple[str, str], ...]) -> Any:
    """The first class of `places` that the release has."""
    for module, name in places:
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    tried = ", ".join(f"{module}.{name}" for module, name in places)
    raise StepFailed(
        f"this Megatron-Bridge is not one that steps knows: it has none of {tried}",
        hint="Releases from 0.3 on are known. " + WHERE_TO_GET,
    )
