"""The parameters of a step as its typed configuration defines them."""

from __future__ import annotations

import importlib
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from steps.config import yaml12
from steps.config.validate import fields
from steps.dispatch import catalog
from steps.manifest import Manifest
from steps.preflight import lookup


def parameters(step: Manifest) -> list[dict[str, Any]]:
    """Each leaf of the config: key, type, default (default.yaml's if it has one, `...` if required), description."""
    shipped = catalog.configs(step).get("default")
    data = yaml12.load(shipped)[0] if shipped else {}
    rows = []
    for key, info in fields(importlib.import_module(step.schema_module).Config):
        value = lookup(data, key)
        if value is None:
            value = ... if info.is_required() else info.get_default(call_default_factory=True)
        rows.append(
            {"key": key, "type": type_name(info.annotation), "default": value, "description": info.description or ""}
        )
    return rows


def type_name(annotation: Any) -> str:
    """`int`, `str | null`, `cosine | linear`: a type as a user of YAML thinks of it."""
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_name(option) for option in get_args(annotation))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    origin, inner = get_origin(annotation), ", ".join(map(type_name, get_args(annotation)))
    return f"{getattr(origin, '__name__', origin)}[{inner}]" if origin is not None else "any"
