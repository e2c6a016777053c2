"""Open what a config value points to as an artifact of a type: found, whole, of the right type."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps.artifacts import checkpoint, graph, packed_parquet, training_jsonl
from steps.artifacts.record import Record, missing_files, read
from steps.errors import ArtifactError, Problem


@dataclass(frozen=True)
class Artifact:
    """An input that was found. `path` is None for a Hub id, which is only fetched when the step runs."""

    key: str
    type: str
    value: str
    path: Path | None
    record: Record | None = None
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


# On-disk contract by type: takes the path, returns what is wrong with it ("" when nothing is).
CONTRACTS: Mapping[str, Callable[[Path], str]] = {
    "packed_parquet": packed_parquet.check,
    "checkpoint_hf": checkpoint.check_hf,
    "checkpoint_megatron": checkpoint.check_megatron,
    "checkpoint_lora": checkpoint.check_lora,
    "checkpoint_hf_adapter": checkpoint.check_hf_adapter,
    "training_jsonl": training_jsonl.check,
}

# How what is there can be seen to be damaged, in the same way.
DAMAGES: Mapping[str, Callable[[Path], str]] = {
    "checkpoint_hf": checkpoint.damage_hf,
    "checkpoint_hf_adapter": checkpoint.damage_hf_adapter,
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


#: Types that may be given by a Hub id instead of a path.
NAMED_TYPES = frozenset({"checkpoint_hf"})


def is_hub_id(value: str) -> bool:
    """Whether `value` can only mean a model on the Hugging Face Hub (`org/name`, no such local path)."""
    return bool(_HUB_ID.fullmatch(value)) and not Path(value).exists()


def open_artifact(value: str, type: str, key: str = "") -> Artifact:
    """Find the artifact that config key `key` names.

    Raises ArtifactError, with the manifest error name `missing_<type>`, `wrong_type` or `damaged_artifact`.
    """
    if type in NAMED_TYPES and is_hub_id(value):
        return Artifact(key, type, value, None, warnings=(f"{value} is fetched from the Hugging Face Hub",))
    path = Path(value).expanduser()
    if type == "packed_parquet":
        path = packed_parquet.folder(path)
    paths = training_jsonl.expand(value) if graph.is_a("training_jsonl", type) else [path]
    if not paths or not paths[0].exists():
        raise _error(key, f"there is no {type} at {value}", f"missing_{type}")
    root = packed_parquet.root(path) if type == "packed_parquet" else path
    home = checkpoint.home(root)
    record = read(home) if home.is_dir() else None
    if record is not None and not graph.is_a(record.type, type):
        route = graph.route(record.type, type)
        hint = f"Make a {type} of it: {', then '.join(f'`steps run {step}`' for step in route)}." if route else ""
        raise _error(key, f"{value} is a {record.type}, not a {type}", "wrong_type", hint)
    if record is not None:
        if gone := missing_files(home, record):
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            raise _error(key, f"{value} is damaged: {gone[0]}{more} is missing or has another size", "damaged_artifact")
        return Artifact(key, type, value, root, record, facts=_facts(record, root, home))
    for wanted, check in CONTRACTS.items():
        if graph.is_a(type, wanted) and (fault := check(path)):
            raise _error(key, f"{value} is no {type}: {fault}", "wrong_type")
    if type in DAMAGES and (lack := DAMAGES[type](path)):
        raise _error(key, f"{value} is damaged: {lack}", "damaged_artifact")
    warnings = (
        ()
        if graph.is_a(type, "training_jsonl") or type in DAMAGES
        else (f"{value} has no artifact.json: its contents are taken on trust",)
    )
    return Artifact(key, type, value, root, warnings=warnings)


def _facts(record: Record, root: Path, home: Path) -> Mapping[str, Any]:
    """What the record says of what is opened. The fingerprint of a model is that of its last iteration alone."""
    if (
        record.type != "checkpoint_megatron"
        or root == home
        or root.name == f"iter_{record.facts.get('iteration', 0):07d}"
    ):
        return record.facts
    return {name: value for name, value in record.facts.items() if name != "base_fingerprint"}


def _error(key: str, what: str, name: str, hint: str = "") -> ArtifactError:
    return ArtifactError(Problem(where=key, what=what, name=name, hint=hint))
