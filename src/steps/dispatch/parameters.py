"""The parameters of a step as its typed configuration defines them."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from steps.artifacts.record import write_text
from steps.dispatch import catalog
from steps.manifest import Manifest

#: Stands for "no default" (JSON has no ellipsis).
REQUIRED = "<required>"


def parameters(step: Manifest) -> list[dict[str, Any]]:
    """Each leaf of the config: key, type, default (default.yaml's if it has one, REQUIRED if required), description.

    Kept in the user's cache under a digest of everything it is made from, so that `show` and Tab need no pydantic.
    """
    sources = [step.folder / "schema.py", *sorted((catalog.ROOT / "config").rglob("*.py")), Path(__file__)]
    shipped = catalog.configs(step).get("default")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, *([shipped] if shipped else [])]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steps"
    kept = cache / f"parameters-{step.id.replace('/', '-')}.json"
    try:
        known = json.loads(kept.read_text())
        if known["digest"] == digest.hexdigest():
            rows: list[dict[str, Any]] = known["rows"]
            return rows
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rows = json.loads(json.dumps(_parameters(step, shipped), default=str))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({"digest": digest.hexdigest(), "rows": rows}))
    except OSError:  # no home, read-only, full: it is only slower then
        pass
    return rows


def _parameters(step: Manifest, shipped: Path | None) -> list[dict[str, Any]]:
    from steps.config import yaml12
    from steps.config.validate import fields
    from steps.preflight import lookup

    data = yaml12.load(shipped)[0] if shipped else {}
    rows = []
    for key, info in fields(importlib.import_module(step.schema_module).Config):
        value = lookup(data, key)
        if value is None:
            value = REQUIRED if info.is_required() else info.get_default(call_default_factory=True)
        description = info.description or ""
        rows.append({"key": key, "type": type_name(info.annotation), "default": value, "description": description})
    return rows


def type_name(annotation: Any) -> str:
    """`int`, `str | null`, `cosine | linear`: a type as a user of YAML thinks of it."""
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_name(option) for option in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    origin, inner = get_origin(annotation), ", ".join(map(type_name, get_args(annotation)))
    return f"{getattr(origin, '__name__', origin)}[{inner}]" if origin is not None else "any"
