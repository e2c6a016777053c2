"""Env profiles: where a job runs. So far there is one, `local`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steps.dispatch.compose import Composed
from steps.errors import ExecutorError, suggest

LOCAL = "local"


@dataclass(frozen=True)
class Profile:
    """One profile: the executor it names and the `run.env` values it brings, `${…}` in them unresolved.

    sources: key -> "env.toml [slurm_base]".
    """

    name: str
    executor: str = LOCAL
    env: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> Composed | None:
        """The layer that this profile is under a step's configuration."""
        if not self.env:
            return None
        sources = {f"run.env.{key}": source for key, source in self.sources.items()}
        return Composed({"run": {"env": dict(self.env)}}, sources)


def load(name: str | None, env_file: str | None = None) -> Profile:
    """The profile of that name; without a name, this machine."""
    known = {LOCAL: Profile(LOCAL)}
    if name is None:
        return known[LOCAL]
    if name not in known:
        raise ExecutorError(
            f"there is no profile {name!r}", hint=suggest(name, known) or f"Profiles: {', '.join(known)}"
        )
    return known[name]
