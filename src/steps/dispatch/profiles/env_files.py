"""The TOML files that hold profiles: which ones are read, and every table in them with the place it stands in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import steps
from steps.errors import ExecutorError, Problem

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

NAME = "env.toml"
VARIABLES = ("STEPS_ENV_FILE", "NEMOTRON_ENV_FILE")
SHIPPED = Path(steps.__file__).parent / "profiles"
#: What marks the top of a project: an env.toml above it belongs to something else.
_TOPS = ("pyproject.toml", ".git")


@dataclass(frozen=True)
class Table:
    """One table of a file: a profile, or something of another tool's. file: as people know it, "env.toml"."""

    name: str
    file: str
    values: Mapping[str, Any]
    shipped: bool = False

    @property
    def place(self) -> str:
        """Where it stands: "env.toml [slurm_base]"."""
        return f"{self.file} [{self.name}]"


@dataclass(frozen=True)
class Tables:
    """Every table there is, by name. own: the user's, which win; shipped: those of the package."""

    own: Mapping[str, Table]
    shipped: Mapping[str, Table]

    @property
    def all(self) -> dict[str, Table]:
        return {**self.own, **{name: table for name, table in self.shipped.items() if name not in self.own}}


def tables(env_file: str | None = None) -> Tables:
    """The tables of the user's file and of the shipped ones.

    Raises ExecutorError for a file that was named and is not there, and for one that is no TOML.
    """
    path = own_file(env_file)
    own = _read(path, _shown(path)) if path else {}
    shipped: dict[str, Table] = {}
    for file in sorted(SHIPPED.glob("*.toml")):
        shipped.update(_read(file, f"{SHIPPED.name}/{file.name}", shipped=True))
    return Tables(own, shipped)


def own_file(env_file: str | None = None) -> Path | None:
    """The user's file: the one that is named, or the next env.toml from here up to the top of the project."""
    named = [("--env-file", env_file), *((f"${name}", os.environ.get(name)) for name in VARIABLES)]
    for who, value in named:
        if value:
            path = Path(value).expanduser()
            if fault := _fault(path):
                what = f"{who} names {value}, which {fault}"
                raise ExecutorError(what, hint="`steps profiles init slurm|lepton PATH` writes a file to start from.")
            return path
    here = Path.cwd()
    for folder in (here, *here.parents):
        if not _fault(folder / NAME):
            return folder / NAME
        if any(_fault(folder / top) != _MISSING for top in _TOPS):
            break
    return None


_MISSING = "is not there"


def _fault(path: Path) -> str:
    """Why there is no file to read, '' when there is one."""
    try:
        return "is a directory" if path.is_dir() else "" if path.exists() else _MISSING
    except OSError as error:  # a folder that may not be entered, a name that is too long
        return f"cannot be reached: {error.strerror}"


def _shown(path: Path) -> str:
    """The path as short as it can be told from here."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _read(path: Path, shown: str, *, shipped: bool = False) -> dict[str, Table]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ExecutorError(_syntax(error, text, shown)) from error
    except UnicodeDecodeError as error:
        raise ExecutorError(f"{shown} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ExecutorError(f"{shown} cannot be read: {error.strerror or error}") from error
    # What stands above the first table belongs to no profile.
    found = {name: _plain(values) for name, values in data.items() if isinstance(values, dict)}
    return {name: Table(name, shown, values, shipped) for name, values in found.items()}


def _syntax(error: ValueError, text: str, shown: str) -> Problem:
    message, hint = str(error), ""
    where = shown
    if at := re.search(r" \(at line (\d+), column (\d+)\)", message):
        line, column = int(at[1]), int(at[2])
        where, message = f"{shown}:{line}:{column}", message[: at.start()]
        written = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
        if key := re.match(r"\s*([\w-]+)\s*\+", written):
            hint = f'A key with a + stands in quotes: "{key[1]}+" = […]'
        elif re.match(r"\s*[\w.-]+\s*=\s*[^\s\"'\[{]", written):
            hint = 'Text stands in quotes: name = "value".'
    return Problem(where=where, what=message[:1].lower() + message[1:], hint=hint)


def _plain(value: Any) -> Any:
    """The value without TOML's dates and times: who writes `time = 12:00:00` without quotes means the text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, date | time) else value
