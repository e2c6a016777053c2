"""The types of artifacts, which may stand for which, and how to get from one to another."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from steps.errors import UsageError, suggest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]


@dataclass(frozen=True)
class ArtifactType:
    """One table of types.toml."""

    name: str
    description: str = ""
    is_a: tuple[str, ...] = ()
    convert_to: Mapping[str, str] = field(default_factory=dict)


@cache
def types() -> Mapping[str, ArtifactType]:
    """Every artifact type, by name."""
    with (Path(__file__).parent / "types.toml").open("rb") as file:
        tables = tomllib.load(file)
    return {
        name: ArtifactType(name, table["description"], tuple(table.get("is_a", ())), table.get("convert_to", {}))
        for name, table in tables.items()
    }


def known(name: str) -> str:
    """`name` itself if it is a type; a UsageError with a suggestion otherwise."""
    if name in types():
        return name
    hint = suggest(name, types()) or f"Types: {', '.join(types())}"
    raise UsageError(f"unknown artifact type {name!r}", hint=hint)


def is_a(name: str, wanted: str) -> bool:
    """Whether an artifact of type `name` may be used where `wanted` is asked for."""
    return name == wanted or any(is_a(parent, wanted) for parent in types()[name].is_a)


def route(source: str, target: str) -> list[str] | None:
    """The ids of the conversion steps from `source` to `target`, shortest first; [] when none is needed."""
    queue: deque[tuple[str, list[str]]] = deque([(source, [])])
    seen = {source}
    while queue:
        name, steps = queue.popleft()
        if is_a(name, target):
            return steps
        for successor, step in types()[name].convert_to.items():
            if successor not in seen:
                seen.add(successor)
                queue.append((successor, [*steps, step]))
    return None
