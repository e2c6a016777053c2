"""Which steps there are, and which one a person means."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import steps
from steps import manifest
from steps.artifacts import graph
from steps.errors import ConfigError, Problem, UsageError, suggest
from steps.manifest import Manifest

ROOT = Path(steps.__file__).parent


@cache
def _read(folder: Path) -> Manifest:
    return manifest.read(folder, ROOT)


@cache
def catalog() -> Mapping[str, Manifest]:
    """Every step by id: a folder two levels below the package that holds a step.toml."""
    found = (_read(path.parent) for path in sorted(ROOT.glob(f"*/*/{manifest.MANIFEST}")))
    return {entry.id: entry for entry in found}


def is_path(name: str) -> bool:
    """Whether a person means something on disk, not a step: it is there, and no step is called so."""
    return Path(name).expanduser().exists() and name not in catalog() and not _tails(name)


def _tails(name: str) -> list[str]:
    return [step for step in catalog() if step.endswith("/" + name)]


def find(name: str) -> Manifest:
    """The step a person means by its id or by an unambiguous tail of it (`merge_lora`)."""
    name = name.strip("/")
    if name.count("/") == 1 and (ROOT / name / manifest.MANIFEST).is_file():
        return _read(ROOT / name)  # without reading all the others
    if name in catalog():
        return catalog()[name]
    tails = _tails(name)
    if len(tails) == 1:
        return catalog()[tails[0]]
    if tails:
        raise UsageError(f"{name!r} could be any of {', '.join(tails)}", hint="Write the whole id.")
    known = [*catalog(), *(step.rpartition("/")[2] for step in catalog())]
    hint = suggest(name, known) or f"Steps: {', '.join(catalog())}"
    raise UsageError(f"there is no step {name!r}", hint=hint)


def select(
    *, category: str | None = None, consumes: str | None = None, produces: str | None = None, tag: str | None = None
) -> list[Manifest]:
    """The steps that fit every filter. Types follow is_a both ways a user may mean them:
    a step that takes a training_jsonl also takes a raw_jsonl; a step that makes a raw_jsonl makes a training_jsonl."""
    chosen = list(catalog().values())
    if category is not None:
        names = sorted({step.category for step in chosen})
        if category not in names:
            raise UsageError(
                f"unknown category {category!r}", hint=suggest(category, names) or f"Categories: {', '.join(names)}"
            )
        chosen = [step for step in chosen if step.category == category]
    if tag is not None:
        tags = sorted({tag for step in chosen for tag in step.tags})
        if tag not in tags:
            raise UsageError(f"unknown tag {tag!r}", hint=suggest(tag, tags) or f"Tags: {', '.join(tags)}")
        chosen = [step for step in chosen if tag in step.tags]
    if consumes is not None:
        wanted = graph.known(consumes)
        chosen = [step for step in chosen if any(graph.is_a(wanted, port.type) for port in step.consumes)]
    if produces is not None:
        wanted = graph.known(produces)
        chosen = [step for step in chosen if any(graph.is_a(port.type, wanted) for port in step.produces)]
    return chosen


def configs(step: Manifest) -> dict[str, Path]:
    """The configurations a step ships, by name, `default` first."""
    found = {path.stem: path for path in sorted((step.folder / "config").glob("*.yaml"))}
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "default", name))}


def config_path(step: Manifest, name: str) -> Path:
    """The file that `-c NAME|PATH` means: a shipped name, or a path of the user's own."""
    shipped = configs(step)
    if name in shipped:
        return shipped[name]
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if path.is_file():
            return path
        raise ConfigError(Problem(where="-c", what=f"there is no file {name}", allowed=", ".join(shipped)))
    hint = suggest(name, shipped) or "A file of your own needs its ending: -c path/to.yaml."
    raise ConfigError(
        Problem(where="-c", what=f"{step.id} has no config {name!r}", allowed=", ".join(shipped), hint=hint)
    )
