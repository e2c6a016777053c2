"""What a job is told to wait for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steps.dispatch import job
from steps.dispatch.executors.slurm import submit
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.job import JobRecord, JobSpec, Status
from steps.errors import ExecutorError

HERE = {"executor": "slurm", "tunnel": "local"}


def made(
    root: Path, name: str, env: dict[str, Any], status: Status | None = None, after: tuple[str, ...] = ()
) -> JobSpec:
    """A job on disk, with what is known of it."""
    spec = JobSpec(
        id=name, step="data_prep/demo_chat", module="steps.data_prep.demo_chat.step", directory=root / name,
        config={"run": {"env": env}}, sources={}, config_name="tiny", profile="p", executor=env["executor"],
        environment=SlurmEnv.model_validate(env), after=after,
    )  # fmt: skip
    job.create(spec, {})
    if status:
        status.write(spec.directory)
    return spec


def nobody(jobs: list[JobRecord]) -> list[Status]:
    raise AssertionError("what has ended need not be asked for")


def waiting(number: str, state: str = "pending") -> Status:
    return Status(state, handle={"slurm_job_id": number, "directory": "/x"})


def test_the_numbers_of_those_that_have_not_ended(tmp_path):
    made(tmp_path, "done", HERE, Status("succeeded", 0, handle={"slurm_job_id": "1"}))
    made(tmp_path, "running", HERE, waiting("2", "running"))
    made(tmp_path, "pending", HERE, waiting("3"))
    spec = made(tmp_path, "new", HERE, after=("done", "running", "pending"))
    asked = []
    assert submit.dependency(spec, lambda jobs: asked.extend(jobs) or [one.status for one in jobs]) == "afterok:2:3"
    assert [one.id for one in asked] == ["running", "pending"]


def test_a_job_of_the_directory_above(tmp_path):
    """`--after` finds it there, and so does the submission."""
    made(tmp_path / ".steps/jobs", "before", HERE, waiting("2"))
    spec = made(tmp_path / "below/.steps/jobs", "new", HERE, after=("before", "none"))
    with pytest.raises(ExecutorError, match="none, which this job shall wait for, is lost: its directory is gone"):
        submit.dependency(spec, lambda jobs: [one.status for one in jobs])
    assert submit.dependency(replace(spec, after=("before",)), lambda jobs: [one.status for one in jobs]) == "afterok:2"


def test_what_the_cluster_says_now_counts(tmp_path):
    """The record is as old as the last look."""
    made(tmp_path, "before", HERE, waiting("2"))
    spec = made(tmp_path, "new", HERE, after=("before",))
    assert submit.dependency(spec, lambda jobs: [Status("succeeded", 0)]) == ""
    with pytest.raises(ExecutorError, match=r"before, which this job shall wait for, is failed \(OUT_OF_MEMORY\)"):
        submit.dependency(spec, lambda jobs: [Status("failed", 1, "OUT_OF_MEMORY")])


@pytest.mark.parametrize("state", ["failed", "cancelled", "lost"])
def test_what_will_never_succeed_is_refused(tmp_path, state):
    made(tmp_path, "before", HERE, Status(state, 1, handle={"slurm_job_id": "1"}))
    with pytest.raises(ExecutorError, match=f"is {state}"):
        submit.dependency(made(tmp_path, "new", HERE, after=("before",)), nobody)


def test_another_executor_or_cluster_is_refused(tmp_path):
    made(tmp_path, "local", {"executor": "local"}, Status("running"))
    made(tmp_path, "far", {"executor": "slurm", "tunnel": "ssh", "host": "far"}, waiting("7"))
    for name, words in (("local", "executor local"), ("far", "another cluster")):
        with pytest.raises(ExecutorError, match=words):
            submit.dependency(made(tmp_path, f"after-{name}", HERE, after=(name,)), nobody)


def test_the_profiles_own_dependency_is_kept(tmp_path):
    made(tmp_path, "before", HERE, waiting("2"))
    spec = made(tmp_path, "new", {**HERE, "dependency": "singleton"}, after=("before",))
    assert submit.dependency(spec, lambda jobs: [one.status for one in jobs]) == "singleton,afterok:2"
    assert submit.dependency(replace(spec, after=()), nobody) == "", "the script has it"
