"""What an executor is: it renders a job as text, which changes nothing, starts it, and later knows how it went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from steps.config.base import RunEnv, StepConfig
from steps.dispatch.job import JobRecord, JobSpec, Status
from steps.errors import Problem


class Executor(Protocol):
    """One way to run jobs. Every failure of the machinery behind it is an ExecutorError, never a traceback.

    env:            the class that types `run.env` for this executor.
    imports_images: whether `--force-squash` means something here.
    has_order:      whether a job can wait for others (`--after`, `--upstream -b`).
    """

    env: type[RunEnv]
    imports_images: bool
    has_order: bool

    def workspace(self, env: Any) -> str | None:
        """Where relative paths of a configuration start on the machine of the job. None: the job starts where it was
        submitted, and they can stay as they are."""

    def sees_this_machine(self, env: Any) -> bool:
        """Whether the job reads the files that are read here, so that its inputs can be checked before it starts."""

    def check(self, config: StepConfig, env: Any) -> Iterable[Problem]:
        """What makes this configuration impossible to run. Asks nobody."""

    def probe(self, env: Any) -> Iterable[Problem]:
        """What is missing on this machine or on the cluster, found by asking there (`steps profiles check`)."""

    def render(self, spec: JobSpec) -> Mapping[str, str]:
        """The files that the job's directory will hold (name -> text), the script or request among them. Pure."""

    def submit(self, spec: JobSpec) -> Status:
        """Start the job, whose directory exists, and return at once. The Status holds the handle by which it is found
        later; it is already on disk when a failure could leave a job behind that nobody knows."""

    def attach(self, spec: JobSpec) -> int:
        """Start the job, show its output until its end, and return its own exit code (130 when Ctrl-C ended it)."""

    def place(self, job: JobRecord) -> str:
        """The cluster that a job is on, by any name: the jobs of one place are asked about together, and a place that
        does not answer hides no other. Asks nobody."""

    def look(self, jobs: Sequence[JobRecord]) -> list[Status]:
        """What has become of each, asking the cluster only once where it can. Writes nothing. Raises ExecutorError when
        the cluster cannot be reached."""

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[bytes]:
        """The job's output from its beginning, piece by piece. follow: until the job has ended; an empty piece comes at
        least every second, so that the reader can do something else in between."""

    def cancel(self, job: JobRecord) -> None:
        """End the job and everything it started, waiting or running. A job that has ended is left alone."""

    def fetch(self, job: JobRecord) -> None:
        """Bring the log, the metrics and the summary of a job that has ended into its directory here, and remove what
        only a waiting or running job needs (its secrets). Twice does no harm."""
