"""step.toml: what a step is, what it consumes and produces, and how its failures are told.

Read by the dispatcher (before launch) and by `runtime` (inside the job), so it belongs to neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from steps.artifacts import graph
from steps.errors import Problem, StepsError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

MANIFEST = "step.toml"


@dataclass(frozen=True)
class Port:
    """An artifact that goes in or comes out. `key` is the config key that holds its path."""

    type: str
    key: str
    description: str = ""
    required: bool = True


@dataclass(frozen=True)
class Parameter:
    """A parameter worth knowing. The typed config is the truth; a test holds these against it."""

    name: str
    description: str
    default: Any = None
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Strategy:
    """Advice: when this is so, then do that."""

    when: str
    then: str


@dataclass(frozen=True)
class KnownError:
    """A failure the step knows by name."""

    name: str
    cause: str
    recovery: str


@dataclass(frozen=True)
class RunTable:
    """How the step is launched. passthrough: whether it reads arguments behind `--`."""

    launch: str = "python"
    image: str = ""
    passthrough: bool = False
    resources: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """One step.toml, validated."""

    id: str
    name: str
    category: str
    description: str
    folder: Path
    tags: tuple[str, ...] = ()
    consumes: tuple[Port, ...] = ()
    produces: tuple[Port, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    errors: tuple[KnownError, ...] = ()
    run: RunTable = field(default_factory=RunTable)
    reference: Mapping[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module that `python -m` runs."""
        return f"steps.{self.id.replace('/', '.')}.step"

    @property
    def schema_module(self) -> str:
        """The module whose `Config` types the step's configuration."""
        return f"steps.{self.id.replace('/', '.')}.schema"

    def explain(self, problem: Problem) -> Problem:
        """The problem, reported under its manifest name with cause and recovery, where the manifest knows it."""
        known = next((error for error in self.errors if error.name == problem.name), None)
        if known is None or f"[{known.name}]" in problem.hint:
            return problem
        parts = [
            problem.hint,
            f"[{known.name}]",
            *(text for text in (known.cause, known.recovery) if text not in problem.hint),
        ]
        return replace(problem, hint=" ".join(filter(None, parts)))


_TABLES: Mapping[str, type] = {
    "consumes": Port, "produces": Port, "parameters": Parameter, "strategies": Strategy, "errors": KnownError,
}  # fmt: skip

T = TypeVar("T")


def read(folder: Path, root: Path) -> Manifest:
    """Read and validate `folder/step.toml`. `root` is the folder that step ids are relative to.

    Raises StepsError naming the file and the fault: a broken manifest is our bug or a step author's, never a user's.
    """
    path = folder / MANIFEST
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepsError(f"{path}: {error}") from error
    step = dict(data.pop("step", {}))
    tables: dict[str, Any] = {
        name: tuple(_row(kind, row, f"{path}: [[{name}]]") for row in data.pop(name, ()))
        for name, kind in _TABLES.items()
    }
    run = _row(RunTable, data.pop("run", {}), f"{path}: [run]")
    reference = data.pop("reference", {})
    if data:
        raise StepsError(f"{path}: unknown table {next(iter(data))!r}")
    step["tags"] = tuple(step.get("tags", ()))
    manifest = _row(
        Manifest, {**step, **tables, "run": run, "reference": reference, "folder": folder}, f"{path}: [step]"
    )
    expected = folder.relative_to(root).as_posix()
    if manifest.id != expected:
        raise StepsError(f"{path}: id {manifest.id!r} is not its path {expected!r}")
    if manifest.category != expected.partition("/")[0]:
        raise StepsError(f"{path}: category {manifest.category!r} is not the first part of its id")
    if manifest.run.launch not in ("python", "torchrun"):
        raise StepsError(f"{path}: launch {manifest.run.launch!r} is neither python nor torchrun")
    for port in (*manifest.consumes, *manifest.produces):
        if port.type not in graph.types():
            raise StepsError(f"{path}: unknown artifact type {port.type!r}")
    return manifest


def _row(kind: type[T], row: Mapping[str, Any], where: str) -> T:
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    for name in row:
        if name not in known:
            raise StepsError(f"{where}: unknown key {name!r} (known: {', '.join(known)})")
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in row:
            raise StepsError(f"{where}: {name} is missing")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
