"""`steps jobs rerun`: what a job was asked to do, asked once more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from steps.dispatch import catalog, jobs
from steps.dispatch.compose import Composed
from steps.dispatch.job import MASK, JobRecord
from steps.dispatch.plan import Place, Planned, plan, refuse
from steps.errors import ConfigError, Problem, UsageError


def planned(record: JobRecord, *, attached: bool | None = None) -> Planned:
    """A new job with the same resolved configuration. Its inputs are checked as they are now.

    attached: whether somebody stays; None: as it was. Moves to the directory where the job was submitted, since paths
    mean what they meant there. Secrets, which were not written down, are taken from this shell's environment.
    Raises UsageError, ConfigError, ArtifactError or ExecutorError.
    """
    asked = record.asked
    if not record.executor:
        raise UsageError(f"job {record.id} cannot be run again: {record.status.reason}")
    step, composed = catalog.find(record.step), _composed(record)
    place = Place(
        str(asked["profile"]), attached=bool(asked.get("attached")) if attached is None else attached,
        after=_unfinished(record),
    )  # fmt: skip
    start = Path(str(asked.get("submitted_from") or "."))
    if not start.is_dir():
        raise UsageError(f"{start}, where job {record.id} was submitted, is gone: its paths start there")
    os.chdir(start)
    again = plan(
        step, str(asked["config"]), composed, place, profile=str(asked["profile"]),
        passthrough=tuple(asked.get("passthrough") or ()), debug=bool(asked.get("debug")),
    )  # fmt: skip
    refuse([again])
    return again


def _unfinished(record: JobRecord) -> tuple[str, ...]:
    """The jobs that it had to wait for and that still have not ended."""
    others = jobs.refresh([jobs.by_id(name, record.directory) for name in record.asked.get("after") or ()])
    return tuple(other.id for other in others if not other.status.ended)


def _composed(record: JobRecord) -> Composed:
    """The resolved configuration, with the secrets that this shell knows."""
    data: dict[str, Any] = dict(record.asked["resolved"])
    masked = [name for name, value in (record.run_env.get("env_vars") or {}).items() if value == MASK]
    given = record.asked.get("environment") or {}
    values = {}
    problems = []
    for name in masked:
        if name not in given:  # it was empty then
            values[name] = ""
        elif name in os.environ:
            values[name] = os.environ[name]
        else:
            what = f"the value that job {record.id} had is a secret, which is not on disk, and it is not set here"
            problems.append(Problem(f"run.env.env_vars.{name}", what, hint=f"Give it: {name}=… steps jobs rerun …"))
    if problems:
        raise ConfigError(problems)
    if masked:
        env = {**data["run"]["env"], "env_vars": {**data["run"]["env"]["env_vars"], **values}}
        data["run"] = {**data["run"], "env": env}
    return Composed(data, dict(record.asked.get("sources") or {}), frozenset(masked))
