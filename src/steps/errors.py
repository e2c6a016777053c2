"""Everything that can go wrong for a user, in one tree, one exit code each.

    StepsError              1  the step failed
    ├── StepFailed          1  a step's own work failed (data all dropped, loss not finite, …)
    ├── UsageError          2  unknown option, step id or artifact type; -r together with -b
    ├── ConfigError         3  unknown config name or key, wrong type or choice; holds every problem found
    ├── ArtifactError       4  an input is missing, broken, or does not fit the other inputs
    ├── ExecutorError       5  the profile or the executor
    └── Interrupted       130  Ctrl-C or SIGTERM

Libraries raise these; only the command line and `runtime.main` print them and exit. Each message says what
is wrong, where it came from, what is allowed and what to do next. `name` is the key of a manifest's
`[[errors]]` entry (`tokenizer_mismatch`, …): its cause and recovery are printed with the failure.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, told so that the reader can act without opening the code.

    where:  the config key or file the problem sits at ("peft.dim", "data.jsonl:17").
    what:   the fault in one sentence, lower case, no full stop.
    source: where the value came from ("command line", "tiny.yaml:12"), empty when that says nothing.
    allowed: what would have been accepted.
    hint:   what to do next.
    name:   a manifest error name, when the manifest knows this failure.
    """

    where: str
    what: str
    source: str = ""
    allowed: str = ""
    hint: str = ""
    name: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.source:
            text += f" (from {self.source})"
        for part in (f"Allowed: {self.allowed}" if self.allowed else "", self.hint):
            if part:
                text = text.rstrip(".") + ". " + part
        return text

    def to_dict(self) -> dict[str, str]:
        """The non-empty fields, for `--json`."""
        return {key: value for key, value in vars(self).items() if value}


@dataclass(frozen=True)
class Note(Problem):
    """Something worth knowing that by itself refuses nothing."""


@dataclass(frozen=True)
class Setting(Problem):
    """A fault of the configuration that only an artifact brings to light (a rank above the matrix): exit code 3 too."""


class StepsError(Exception):
    """A failure with a message for the user. `problems` holds one or more things that are wrong."""

    exit_code = 1

    def __init__(self, problems: str | Problem | Iterable[Problem], *, hint: str = "", name: str = "") -> None:
        assert isinstance(problems, str) or not (hint or name), "a Problem has its own hint and name"
        if isinstance(problems, str):
            problems = Problem(where="", what=problems, hint=hint, name=name)
        self.problems: Sequence[Problem] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    @property
    def name(self) -> str:
        """The first manifest error name among the problems, or ''."""
        return next((problem.name for problem in self.problems if problem.name), "")


class StepFailed(StepsError):
    """A step could not do its work."""

    exit_code = 1


class UsageError(StepsError, ValueError):
    """The command line itself makes no sense."""

    exit_code = 2


class ConfigError(StepsError, ValueError):
    """The configuration is wrong; every problem found is in it, not only the first."""

    exit_code = 3


class ArtifactError(StepsError, ValueError):
    """An input artifact is missing, damaged or does not fit."""

    exit_code = 4


def refusal(problems: Sequence[Problem]) -> StepsError:
    """What is wrong with a configuration and its inputs, as an error."""
    alone = all(isinstance(problem, Setting) for problem in problems)
    return ConfigError(problems) if alone else ArtifactError(problems)


class ExecutorError(StepsError):
    """A profile or an executor is wrong or out of reach."""

    exit_code = 5


class Interrupted(StepsError):
    """The user stopped the run."""

    exit_code = 130


def suggest(word: str, known: Iterable[str]) -> str:
    """'Did you mean X?' for the closest known word, or ''."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else ""


def understand(error: BaseException, debug: bool) -> StepsError:
    """A failure of the machine, or of us, in the user's words."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    if isinstance(error, MemoryError) or "not enough memory" in str(error) or "out of memory" in str(error):
        return StepFailed("out of memory", hint="Use a smaller batch or pack_size, or a machine with more memory.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StepFailed(
            f"the disk is full ({error.filename or 'while writing'})", hint="Free some space and run again."
        )
    if isinstance(error, OSError):
        return StepFailed(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    hint = "" if debug else "Run again with --debug for the traceback; it is a bug in steps, please report it."
    return StepFailed(f"{type(error).__name__}: {error}", hint=hint)
