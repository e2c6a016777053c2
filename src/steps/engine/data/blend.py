"""Which files a `blend_path` means: a file, a glob, a directory, or a JSON blend of these with weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps.artifacts.training_jsonl import SUFFIXES, expand
from steps.errors import ConfigError, Problem


@dataclass(frozen=True)
class Source:
    """A set of files in order. weight: how often each of its conversations is used; a fraction takes that share."""

    path: str
    weight: float
    files: tuple[Path, ...]


def resolve(blend_path: str) -> list[Source]:
    """The data that `blend_path` names, in order.

    A blend is a .json file: `{"datasets": [{"path": …, "weight": 2}, …]}` or `{path: weight, …}`. Paths in it are
    relative to its folder. Raises ConfigError with every entry that is wrong.
    """
    path = Path(blend_path).expanduser()
    entries = list(_entries(path)) if path.is_file() and path.suffix == ".json" else [(blend_path, 1.0)]
    problems: list[Problem] = []
    sources: list[Source] = []
    for name, weight in entries:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= 1000:
            problems.append(Problem(where=name, what=f"the weight {weight!r} is no number", allowed="0 to 1000"))
            continue
        files = tuple(file for file in expand(name) if file.is_file())
        strange = [file for file in files if not file.name.endswith(SUFFIXES)]
        if strange:
            problems.append(Problem(where=str(strange[0]), what="unknown kind of file", allowed=", ".join(SUFFIXES)))
        elif not files:
            problems.append(Problem(where=name, what="no data here", name="missing_training_jsonl"))
        sources.append(Source(name, float(weight), files))
    if not entries:
        problems.append(Problem(where=blend_path, what="the blend names no data", name="missing_training_jsonl"))
    if problems:
        raise ConfigError(problems)
    return sources


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        table = data.get("datasets", data)
        pairs = table.items() if isinstance(table, dict) else [(row["path"], row.get("weight", 1.0)) for row in table]
        for name, weight in pairs:
            given = Path(str(name)).expanduser()
            yield str(given if given.is_absolute() else path.parent / given), weight
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        allowed = '{"datasets": [{"path": "chat.jsonl", "weight": 1.0}, …]}'
        hint = "Conversations themselves belong into a .jsonl file."
        raise ConfigError(
            Problem(where=str(path), what=f"this is no blend ({error})", allowed=allowed, hint=hint)
        ) from error
