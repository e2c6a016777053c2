"""The parameters of a step as its typed configuration defines them."""

from __future__ import annotations

import importlib
import re
from typing import Any

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
    literal = re.findall(r"Literal\[([^\]]*)\]", str(annotation))
    if literal:
        text = literal[0].replace("'", "").replace(", ", " | ")
        return text + (" | null" if "None" in str(annotation).replace(literal[0], "") else "")
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return re.sub(r"\b(?:typing\.|steps\.[\w.]+\.)", "", text).replace("None", "null").replace("NoneType", "null")
