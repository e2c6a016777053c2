"""Shipped shapes of well-known models (presets.toml), by name or by size: 7B, 13B and 70B are Llama 2's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from steps.shapes.model_config import ModelConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]


@cache
def presets() -> Mapping[str, ModelConfig]:
    """Every shape by its name, then by its size where it stands for one. Lower case."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    sizes = {name: [size.lower() for size in table.pop("sizes", ())] for name, table in tables.items()}
    shapes = {name: ModelConfig(**table, params_dtype="bfloat16") for name, table in tables.items()}
    return MappingProxyType({**shapes, **{size: shapes[name] for name in shapes for size in sizes[name]}})


def preset(name: str) -> ModelConfig | None:
    """The shape called `name` in any case; None where there is none."""
    return presets().get(name.lower())
