"""Env profiles: where a job runs. So far there is one, `local`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steps.errors import ExecutorError, suggest

LOCAL = "local"


@dataclass(frozen=True)
class Profile:
    """One profile: the executor it names and the `run.env` values it brings."""

    name: str
    executor: str = LOCAL
    env: Mapping[str, Any] = field(default_factory=dict)


def load(name: str | None) -> Profile:
    """The profile of that name; without a name, this machine."""
    known = {LOCAL: Profile(LOCAL)}
    if name is None:
        return known[LOCAL]
    if name not in known:
        raise ExecutorError(
            f"there is no profile {name!r}", hint=suggest(name, known) or f"Profiles: {', '.join(known)}"
        )
    return known[name]
