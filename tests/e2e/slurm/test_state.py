"""What has become of jobs on a real Slurm, here and through ssh, with and without accounting."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from support.slurm import Cluster
from support.slurm_jobs import Place, login_to, number, there

from steps.dispatch.executors.slurm.follow import cancel
from steps.dispatch.executors.slurm.state import look
from steps.dispatch.job import JobRecord, Status
from steps.errors import ExecutorError


def wait(job: JobRecord, *states: str, timeout: float = 30) -> Status:
    """The job's status once it is in one of these states."""
    deadline = time.monotonic() + timeout
    while (status := look([job])[0]).state not in states:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    return status


def test_how_jobs_end(place):
    jobs = {
        "good": place.submit("srun true"),
        "bad": place.submit("srun bash -c 'exit 3'"),
        "killed": place.submit("srun bash -c 'kill -9 $$'"),
        "unlaunched": place.submit("true", "--output=/nosuch/directory/log"),
    }
    seen = {name: wait(job, "succeeded", "failed") for name, job in jobs.items()}
    assert {name: (status.state, status.exit_code, status.reason) for name, status in seen.items()} == {
        "good": ("succeeded", 0, ""),
        "bad": ("failed", 3, "exit code 3"),
        "killed": ("failed", 137, "killed by signal 9"),
        "unlaunched": (
            "failed", 181, "JobLaunchFailure: Slurm could not start it (is its directory writable on the nodes?)"
        ),
    }  # fmt: skip
    for name, job in jobs.items():
        assert seen[name].handle == {"slurm_job_id": str(number(job)), "directory": str(there(job))}
    assert look(list(jobs.values())) == list(seen.values())
    started, ended = (datetime.fromisoformat(getattr(seen["bad"], f"{word}_at")) for word in ("started", "ended"))
    assert started <= ended
    assert abs((datetime.now(timezone.utc) - ended).total_seconds()) < 60


def test_a_job_that_somebody_else_cancels(place):
    """scancel ends the batch script before it writes an exit code: the word is Slurm's."""
    running, held = place.submit("srun sleep 60"), place.submit("true", "--hold")
    wait(running, "running")
    assert look([held])[0].reason == "JobHeldUser"
    place.cluster.run("scancel", str(number(running)), str(number(held)), check=True)
    status = wait(running, "cancelled")
    assert (status.exit_code, status.reason) == (143, "CANCELLED")
    assert status.started_at <= status.ended_at
    assert wait(held, "cancelled").started_at == ""


def test_jobs_that_wait_for_others(place):
    first = place.submit("srun sleep 60", "--hold")
    second = place.submit("true", f"--dependency=afterok:{number(first)}", "--kill-on-invalid-dep=yes")
    third = place.submit("true", f"--dependency=afterok:{number(first)}")
    assert [(status.state, status.reason) for status in look([second, third])] == 2 * [("pending", "Dependency")]
    place.cluster.run("scancel", str(number(first)), check=True)
    assert wait(second, "cancelled").reason == "DependencyNeverSatisfied"
    waiting = look([third])[0]
    assert (waiting.state, waiting.reason, waiting.exit_code) == ("pending", "DependencyNeverSatisfied", None)
    place.cluster.run("scancel", str(number(third)), check=True)


def test_a_submission_that_died_is_found_by_its_name(place):
    """Between sbatch and the handle's writing: the queue has the job's name, later its directory has its number."""
    waiting, never = place.submit("sleep 60", "--hold"), place.record()
    ended = place.submit("exit 4")
    wait(ended, "failed")
    known = {name: number(job) for name, job in (("waiting", waiting), ("ended", ended))}
    for job in (waiting, ended):
        del job.status.handle["slurm_job_id"]
    seen = look([waiting, ended, never])
    assert [(status.state, status.handle.get("slurm_job_id")) for status in seen] == [
        ("pending", str(known["waiting"])),
        ("failed", str(known["ended"])),
        ("lost", None),
    ]
    assert f"no job named {never.id}" in seen[2].reason
    place.cluster.run("scancel", str(known["waiting"]), check=True)
    assert wait(waiting, "cancelled").handle["slurm_job_id"] == str(known["waiting"])


def test_a_number_that_is_another_jobs_by_now(place):
    other, mine = place.submit("sleep 60", "--hold"), place.record()
    mine.status.handle["slurm_job_id"] = str(number(other))
    assert look([mine])[0].state == "lost"
    place.cluster.run("scancel", str(number(other)), check=True)


def test_what_is_known_of_an_end_is_not_forgotten(login):
    gone = login.record()
    gone.status = Status("failed", 3, "exit code 3", handle=gone.status.handle)
    assert look([gone]) == [gone.status]


def test_many_jobs_are_one_question(login, monkeypatch):
    jobs = [login.submit(f"exit {code}") for code in range(20)]
    for job in jobs:
        wait(job, "succeeded", "failed")
    counted = Path(login.there / "bin")
    counted.mkdir()
    (counted / "squeue").write_text(f'#!/bin/sh\necho asked >>{counted}/count\nPATH={os.environ["PATH"]} squeue "$@"\n')
    (counted / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(counted), prepend=os.pathsep)
    assert [status.exit_code for status in look(jobs)] == list(range(20))
    assert (counted / "count").read_text().splitlines() == ["asked"]


def test_times_are_utc_wherever_the_login_node_is(login, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    job = login.submit("srun sleep 60")
    wait(job, "running")
    told = there(job) / "started_at"
    deadline = time.monotonic() + 30
    while not told.exists():  # Slurm calls a job running before its script has begun
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told.unlink()  # Slurm's own word is needed
    age = datetime.now(timezone.utc) - datetime.fromisoformat(look([job])[0].started_at)
    assert 0 <= age.total_seconds() < 30
    login.cluster.run("scancel", str(number(job)), check=True)


def test_a_login_node_of_another_cluster(login, tmp_path, monkeypatch):
    """A home that two clusters share: the other one's ignorance is no end of the job, and costs it no secrets."""
    job = login.submit("true", "--hold")
    job.status.handle |= {"cluster": "private", "image_job_id": "7"}
    ended = login.submit("exit 3")
    wait(ended, "failed")
    ended.status.handle["cluster"] = "private"
    assert look([job])[0].handle == job.status.handle
    with Cluster({"ClusterName": "other"}) as other, monkeypatch.context() as there_now:
        login_to(other, tmp_path, there_now)
        for ask in (look, lambda jobs: cancel(jobs[0])):
            with pytest.raises(
                ExecutorError, match=f"belongs to the Slurm cluster other; {job.id} is on private"
            ) as told:
                ask([job])
            assert told.value.problems[0].hint == "Ask on a login node of private."
        assert look([ended])[0].exit_code == 3, "what its own files tell needs no cluster"
    cancel(job)
    assert wait(job, "cancelled").handle["cluster"] == "private"


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Cluster]:
    """Its controller forgets an ended job after two to four seconds."""
    if lack := Cluster.missing():
        pytest.skip(lack)
    with Cluster({"MinJobAge": "2"}) as running:
        yield running


def forgotten(place: Place, *jobs: JobRecord) -> None:
    """Wait until the controller knows none of them."""
    deadline = time.monotonic() + 20
    while any(place.cluster.show(number(job)) for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_forgotten_jobs(forgetful, tmp_path, monkeypatch):
    """Their files tell, then accounting; without either they are lost, which says so."""
    place = login_to(forgetful, tmp_path, monkeypatch)
    good, bad, cancelled = place.submit("true"), place.submit("exit 7"), place.submit("sleep 60")
    wait(cancelled, "running")
    forgetful.run("scancel", str(number(cancelled)), check=True)
    forgotten(place, good, bad, cancelled)
    seen = look([good, bad, cancelled])
    assert [(status.state, status.exit_code) for status in seen] == [("succeeded", 0), ("failed", 7), ("lost", None)]
    assert seen[2].reason == f"Slurm no longer knows job {number(cancelled)}, and it left no exit code"

    forgetful.write_sacct(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    seen = look([good, bad, cancelled])
    assert [status.state for status in seen] == ["succeeded", "failed", "cancelled"]
    assert seen[2].reason == f"CANCELLED by {os.getuid()}"
    del cancelled.status.handle["slurm_job_id"]
    (there(cancelled) / "slurm_job_id").unlink(missing_ok=True)
    assert look([cancelled])[0] == seen[2], "found by its name"


def test_a_node_that_dies(forgetful, tmp_path, monkeypatch):
    place = login_to(forgetful, tmp_path, monkeypatch)
    job = place.submit("srun sleep 60", "--nodelist=n2", "--no-requeue")
    wait(job, "running")
    forgetful.kill_node("n2")
    try:
        status = wait(job, "failed")
    finally:
        forgetful.start_node("n2")
    assert (status.reason, status.exit_code) == ("NODE_FAIL", 1)


@pytest.mark.slow
def test_a_controller_that_is_down(forgetful, tmp_path, monkeypatch):
    """Nobody is called lost because nobody answers; what has ended well needs no answer."""
    place = login_to(forgetful, tmp_path, monkeypatch)
    good, bad, running = place.submit("true"), place.submit("exit 5"), place.submit("sleep 60")
    wait(running, "running")
    wait(bad, "failed")
    wait(good, "succeeded")
    forgetful.stop_controller()
    try:
        began = time.monotonic()
        assert look([good])[0].state == "succeeded"
        assert time.monotonic() - began < 8, "it asked the controller"
        with pytest.raises(ExecutorError, match="Unable to contact slurm controller"):
            look([good, bad, running])
        assert look([bad])[0].reason == "exit code 5"
    finally:
        forgetful.start_controller()
    assert wait(running, "running").state == "running"
    forgetful.run("scancel", str(number(running)), check=True)


def test_no_slurm_here(login, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    for program in ("bash", "sh", "id", "head"):
        (tmp_path / "bin" / program).symlink_to(f"/bin/{program}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ExecutorError, match="no squeue on its PATH"):
        look([login.record()])


def test_a_host_out_of_reach(login):
    job = login.record()
    unreachable = replace(login, env={**login.env, "tunnel": "ssh", "host": "127.0.0.1", "port": 1})
    with pytest.raises(ExecutorError, match=r"127\.0\.0\.1 cannot be reached: .*Connection refused"):
        look([job, unreachable.record()])
