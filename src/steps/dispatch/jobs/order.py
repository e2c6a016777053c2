"""Jobs that wait for jobs: which ones still matter, and what they promise to make."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from steps.dispatch import catalog, jobs
from steps.dispatch.job import JOBS, SUCCEEDED, JobRecord
from steps.errors import StepsError, UsageError
from steps.preflight import lookup


def waited_for(names: Iterable[str]) -> tuple[str, ...]:
    """The ids of the jobs that `--after` names and that have not succeeded yet.

    Raises UsageError for names that fit no job, and for jobs that ended otherwise: nothing would come after them.
    """
    records = jobs.refresh([jobs.find(name, submitted=True) for name in names])
    for record in records:
        if jobs.by_id(record.id, JOBS / record.id).directory.resolve() != record.directory.resolve():
            hint = "A job can wait for jobs that were submitted here or above; run this where that one was submitted."
            raise UsageError(f"job {record.id} is of another place ({record.directory.parent})", hint=hint)
    for record in records:
        status = record.status
        if status.ended and status.state != SUCCEEDED:
            reason = f", {status.reason}" if status.reason else ""
            hint = f"Start it again (steps jobs rerun {jobs.short(record.id)}) and name the new job."
            raise UsageError(f"job {record.id} has not succeeded: {status.state}{reason}", hint=hint)
    return tuple(record.id for record in records if not record.status.ended)


def promised(identities: Iterable[str]) -> dict[str, str]:
    """Absolute path -> id of the job that will have written it when these jobs, and those they wait for, are done."""
    seen: dict[str, JobRecord] = {}
    waiting = list(identities)
    while waiting:
        identity = waiting.pop()
        if identity not in seen:
            record = seen[identity] = jobs.by_id(identity, jobs.home() / identity)
            waiting += record.asked.get("after") or ()
    return {path: record.id for record in seen.values() for path in _written(record)}


def _written(record: JobRecord) -> Iterator[str]:
    try:
        step = catalog.find(record.step)
    except StepsError:
        return
    for port in step.produces:
        value = lookup(record.asked["resolved"], port.key)
        if isinstance(value, str):
            yield full_path(value, str(record.asked.get("submitted_from") or "."))


def full_path(value: str, base: str = ".") -> str:
    """A path of a configuration, absolute and without detours; base: where relative ones start."""
    return os.path.normpath(Path(base).absolute() / Path(value).expanduser())
