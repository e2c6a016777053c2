"""Overrides, of the command line or of a variant: `a.b=1`, `+a.b=1`, `++a.b=1`, `~a.b`, `a.list.0=x`, `a.list[0]=x`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from steps.config import yaml12
from steps.errors import ConfigError, Problem, UsageError, suggest

SOURCE = "command line"
_PART = re.compile(r"[^.\[\]=\s]+")


@dataclass(frozen=True)
class Override:
    """One parsed override. add: the key must be new; force: set it either way; delete: remove it."""

    key: tuple[str, ...]
    value: Any
    action: Literal["set", "add", "force", "delete"]

    @property
    def dotted(self) -> str:
        return ".".join(self.key)


def parse(texts: Iterable[str]) -> list[Override]:
    """Parse every override; all that are malformed are reported together."""
    parsed, problems = [], []
    for text in texts:
        try:
            parsed.append(_parse(text))
        except ValueError as error:
            problems.append(Problem(where=text, what=str(error), source=SOURCE))
    if problems:
        raise UsageError(problems)
    return parsed


def _parse(text: str) -> Override:
    action: Literal["set", "add", "force", "delete"] = "set"
    body = text
    for prefix, name in (("++", "force"), ("+", "add"), ("~", "delete")):
        if text.startswith(prefix):
            action, body = name, text[len(prefix) :]  # type: ignore[assignment]
            break
    name, equals, raw = body.partition("=")
    if action == "delete" and equals:
        raise ValueError("a deletion has no value: write ~key")
    if action != "delete" and not equals:
        raise ValueError("is neither an option nor key=value")
    key = tuple(part for piece in name.split(".") for part in _indexed(piece))
    if not all(_PART.fullmatch(part) for part in key):
        raise ValueError(f"{name!r} is no dotted key")
    return Override(key, None if action == "delete" else value(raw), action)


def _indexed(piece: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]+)((?:\[\d+\])*)", piece)
    if not match:
        return [""]
    return [match[1], *re.findall(r"\[(\d+)\]", match[2])]


def value(raw: str) -> Any:
    """What the text behind `=` means: a YAML 1.2 scalar, or a list, mapping or quoted text in flow style.

    Everything else is data as it stands: `a: b`, `x #1` and `$(rm x)` are text.
    """
    if raw.strip()[:1] in ("[", "{", '"', "'") and raw.strip():
        try:
            return yaml12.parse_value(raw)
        except ValueError as error:
            raise ValueError(f"the value {raw!r} is not closed: {error}") from error
    return yaml12.scalar(raw)


def apply(data: dict[str, Any], sources: dict[str, str], overrides: Iterable[Override]) -> None:
    """Apply overrides to a composed mapping in place, in order, keeping `sources` true.

    Raises ConfigError with every override that does not fit the structure (a list index out of range, a key below a
    plain value, `+` on a key that exists, `~` on one that does not).
    """
    problems = []
    for override in overrides:
        try:
            _apply_one(data, override)
        except (ValueError, KeyError) as error:
            problems.append(Problem(where=override.dotted, what=str(error.args[0]), source=SOURCE))
            continue
        for known in [key for key in sources if key == override.dotted or key.startswith(override.dotted + ".")]:
            del sources[known]
        if override.action != "delete":
            sources[override.dotted] = SOURCE
    if problems:
        raise ConfigError(problems)


def _apply_one(data: dict[str, Any], override: Override) -> None:
    *path, last = override.key
    place: Any = data
    walked: list[str] = []
    for part in path:
        place = _descend(place, part, ".".join(walked), create=override.action != "delete")
        walked.append(part)
    at = ".".join(walked)
    if isinstance(place, list):
        index = _index(place, last, at, append=override.action != "delete")
        if override.action == "delete":
            del place[index]
        else:
            place[index : index + 1] = [override.value]
        return
    if not isinstance(place, dict):
        raise ValueError(f"{at} is a plain value ({place!r}), it has no keys")
    exists = last in place
    if override.action == "delete":
        if not exists:
            raise ValueError(f"there is no such key to delete ({suggest(last, place) or ', '.join(place)})")
        del place[last]
        return
    if override.action == "add" and exists:
        raise ValueError(f"the key exists already ({place[last]!r}): drop the +, or write ++")
    place[last] = override.value


def _descend(place: Any, part: str, at: str, *, create: bool) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, at, append=False)]
    if not isinstance(place, dict):
        raise ValueError(f"{at} is a plain value ({place!r}), it has no keys")
    if place.get(part) is None:
        if not create:
            raise ValueError(f"there is no such key to delete ({suggest(part, place) or ', '.join(place)})")
        place[part] = {}
    return place[part]


def _index(place: list[Any], part: str, at: str, *, append: bool) -> int:
    limit = len(place) + (1 if append else 0)
    if not part.isdecimal():
        raise ValueError(f"{at} is a list: {part!r} is no index")
    if int(part) >= limit:
        raise ValueError(f"{at} has {len(place)} items (0 to {len(place) - 1}): there is no {part}")
    return int(part)
