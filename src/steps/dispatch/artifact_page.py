"""`steps show DIRECTORY`: what an artifact is, its numbers, where it came from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steps.artifacts import graph
from steps.artifacts.lineage import Origin, trace, walk
from steps.dispatch import render
from steps.errors import ArtifactError
from steps.shapes.estimate import size


def artifact(path: str) -> Origin:
    """The artifact that a person names by a path. Raises ArtifactError for a directory that is none."""
    found = trace(Path(path).expanduser())
    if not found.type:
        hint = "An artifact has an artifact.json, or the files of one of its types: see docs/artifacts.md."
        raise ArtifactError(f"{path} is no artifact that steps knows", hint=hint, name="wrong_type")
    return found


def artifact_json(origin: Origin) -> dict[str, Any]:
    """An artifact and its chain as data, for `--json`."""
    return {
        "path": origin.path, "type": origin.type, "key": origin.key, "faults": list(origin.faults),
        "record": None if origin.record is None else asdict(origin.record),
        "made_from": [artifact_json(part) for part in origin.made_from],
    }  # fmt: skip


def artifact_page(origin: Origin) -> Iterator[str]:
    """Everything there is to know about an artifact."""
    yield f"{render.bold(origin.path)}  {origin.type}"
    yield from textwrap.wrap(graph.types()[origin.type].description, min(render.width(), 100))
    if origin.record is None:
        yield ""
        yield "It has no artifact.json: it was not made by steps, and what it holds is taken on trust."
        return
    record = origin.record
    yield ""
    producer = record.producer
    told = {
        "made by": " ".join(filter(None, (producer.get("step"), _version(producer)))),
        "job": producer.get("job", ""),
        "made at": record.created_at.replace("T", " ").replace("+00:00", " UTC"),
        "files": f"{len(record.files):,}, {size(sum(record.files.values()))}" if record.files else "",
        "digest": record.digest or "none: it was still growing",
    }
    yield from _pairs({name: value for name, value in told.items() if value})
    yield from origin.faults
    if facts := dict(_facts(record.facts)):
        yield from render.section("Facts")
        yield from _pairs(facts)
    yield from render.section("Made from")
    if not origin.made_from:
        yield "nothing that has a record: it begins here"
    yield from _tree(origin, "")
    if broken := [part for part in walk(origin) if part.faults and part is not origin]:
        yield ""
        yield f"{len(broken)} of what it was made from is no longer as it was read; the artifact itself is not touched."


def _version(producer: Mapping[str, str]) -> str:
    return f"(steps {producer['code_version']})" if "code_version" in producer else ""


def _tree(origin: Origin, indent: str) -> Iterator[str]:
    for part in origin.made_from:
        last = part is origin.made_from[-1]
        step = part.record.producer.get("step", "") if part.record else ""
        by = f"by {step}" if step else "no record"
        faults = "".join(f"  ({fault})" for fault in part.faults)
        yield f"{indent}{'└── ' if last else '├── '}{part.type}  {part.path}  {render.dim(by)}{faults}"
        yield from _tree(part, indent + ("    " if last else "│   "))


def _facts(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts in a line each; sections by their dotted names."""
    for name, value in facts.items():
        key = f"{prefix}{name}"
        if value is None or value in ({}, []):
            continue
        if isinstance(value, Mapping):
            yield from _facts(value, f"{key}.")
        elif isinstance(value, float):
            yield key, render.four_digits(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, f"{value:,}"
        elif isinstance(value, str) and len(value) == 64 and " " not in value:
            yield key, f"{value[:12]}…"  # a sha256
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield key, render.one_line(text)


def _pairs(told: Mapping[str, str]) -> Iterator[str]:
    column = max(map(len, told)) + 2
    for name, value in told.items():
        first, *rest = textwrap.wrap(value, max(24, render.width() - column)) or [""]
        yield f"{name.ljust(column)}{first}"
        yield from (f"{'':{column}}{line}" for line in rest)
