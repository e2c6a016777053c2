"""Paths of a configuration, made absolute for a job that starts in a directory of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: What a Hub id looks like: one slash at most, none of a path's marks.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def absolute(
    data: Mapping[str, Any], paths: Iterable[str], names: Iterable[str], workspace: str, *, visible: bool
) -> dict[str, Any]:
    """`data` with the paths under the dotted keys starting at `workspace` instead of at the current directory.

    paths: keys that hold a path and nothing else. names: keys that may hold a Hub id instead, or text.
    visible: whether the job's machine has this machine's files, so that looking tells which of the two it is.
    """
    result = _copy(data)
    paths = set(paths)
    for key in [*paths, *names]:
        section, name = _find(result, key)
        value = section.get(name)
        if not isinstance(value, str) or not value or value.startswith(("/", "~")):
            continue
        if key in paths or _is_path(value, workspace, visible):
            section[name] = str(Path(workspace) / value)
    return result


def _is_path(value: str, workspace: str, visible: bool) -> bool:
    if "\n" in value or "{" in value:  # a template's text
        return False
    return value.startswith(".") or not _HUB_ID.fullmatch(value) or (visible and (Path(workspace) / value).exists())


def _find(data: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *sections, name = key.split(".")
    for part in sections:
        inner = data.get(part)
        if not isinstance(inner, dict):
            return {}, name
        data = inner
    return data, name


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}
