"""What an executor is: it renders a job as text, which changes nothing, and it submits one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from steps.config.base import StepConfig
from steps.dispatch.job import JobSpec
from steps.errors import Problem


class Executor(Protocol):
    """One way to run a job."""

    #: Whether the job sees this machine's files and packages, so that inputs can be checked here.
    is_local: bool

    def check(self, config: StepConfig) -> Iterable[Problem]:
        """What makes this configuration impossible to run here."""

    def render(self, spec: JobSpec) -> Mapping[str, str]:
        """The files that the job's directory will hold (name -> text), the command or request among them. Pure."""

    def submit(self, spec: JobSpec, *, attached: bool) -> int:
        """Run the job (its directory exists). attached: until its end, returning the job's own exit code;
        detached: return 0 once it is on its way."""
