"""What handing a configuration over brings up: problems (all of them, then one error) and notes (one log line each)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from steps.errors import ConfigError, Problem, suggest


@dataclass
class Findings:
    """Collects while a container is built. A setting ends in the container, in `problems` or in `notes`."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, where: str, what: str, *, allowed: str = "", hint: str = "", name: str = "") -> None:
        self.problems.append(Problem(where=where, what=what, allowed=allowed, hint=hint, name=name))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def no_counterpart(self, where: str, value: object, owner: str, known: Iterable[str]) -> None:
        """A setting that Megatron-Bridge has no place for: refused, unless it says that something is off."""
        if value is None or value is False:
            self.note(f"{where}: {owner} has no such setting; it is off, so nothing is lost")
        else:
            hint = suggest(where.rpartition(".")[2], known)
            self.problem(where, f"{owner} has no such setting", hint=hint or "Remove it, or use engine: torch.")

    def raise_if_any(self) -> None:
        """Raises ConfigError with everything found."""
        if self.problems:
            raise ConfigError(self.problems)
