"""What is told of a job in a Lepton workspace, and cancelling it."""

from __future__ import annotations

import re
import signal
from dataclasses import replace

import pytest
from support.lepton_following import running, say, waiting
from support.lepton_site import DEMO, Site, until

from steps.dispatch.executors.lepton import EXECUTOR
from steps.errors import ExecutorError


def test_states_on_the_way(site: Site):
    site.lepton.slow_start(1.5)
    job, go = waiting(site, say("one"))
    (status,) = EXECUTOR.look([job])
    assert (status.state, status.reason, status.handle) == ("pending", "Queueing", job.status.handle)
    running(site, job)
    (status,) = EXECUTOR.look([job])
    assert (status.state, status.reason, status.exit_code) == ("running", "", None)
    assert status.started_at
    go.touch()
    ended = site.ended(job)
    assert (ended.status.state, ended.status.exit_code) == ("succeeded", 0)


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("raise SystemExit(3)", 3, "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "exit code 137"),
        (
            "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
            None,
            "Failed: it was killed (out of memory?), or ",
        ),
    ],
)
def test_how_a_job_failed(site: Site, program: str, code: int | None, reason: str):
    status = site.ended(site.submit(program)).status
    assert (status.state, status.exit_code) == ("failed", code)
    assert status.reason.startswith(reason)
    assert status.ended_at


@pytest.mark.parametrize(("program", "state"), [("", "succeeded"), ("raise SystemExit(3)", "failed")])
@pytest.mark.parametrize("word", ["Archived", "Deleted"])
def test_a_job_that_was_deleted_after_its_end(site: Site, program: str, state: str, word: str):
    """The log is gone with it; counts are left. What was known before stays."""
    site.lepton.archived_state = word
    job = site.submit(program)
    until(lambda: site.remote(job).state in ("Completed", "Failed"))
    (before,) = EXECUTOR.look([job])
    site.remote(job).end("Deleted")
    (status,) = EXECUTOR.look([job])
    assert status.state == before.state == state
    if state == "failed":
        assert status.reason == f"1 of 1 workers had failed, then it was deleted ({word})"
    known = replace(job, status=before)
    assert EXECUTOR.look([known]) == [before]
    assert site.ended(job).status.state == state  # fetching what is left is no failure


def test_a_job_that_lepton_does_not_know(site: Site):
    job = site.submit("")
    until(lambda: site.remote(job).state == "Completed")
    site.lepton.jobs.clear()
    (status,) = EXECUTOR.look([job])
    assert (status.state, status.reason) == ("lost", "Lepton does not know it any more")


def test_another_workspace(site: Site, monkeypatch):
    """It knows nothing of the job, which is not the job's end."""
    job, go = waiting(site, say("one"))
    del site.lepton.requests[:]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("LEPTON_WORKSPACE_ID", "other")
        for call in (
            lambda: EXECUTOR.look([job]),
            lambda: EXECUTOR.cancel(job),
            lambda: EXECUTOR.fetch(job),
            lambda: list(EXECUTOR.logs(job, follow=False)),
        ):
            with pytest.raises(ExecutorError, match=f"this is the Lepton workspace other; {job.id} is in ") as told:
                call()
            assert "lep login -c " in told.value.problems[0].hint
        assert not site.lepton.requests
    go.touch()
    assert site.ended(job).status.state == "succeeded"


def test_many_jobs_are_asked_for_at_once(site: Site):
    found = [site.submit(f"raise SystemExit({number})") for number in range(5)]
    until(lambda: all(site.remote(job).completed for job in found))
    del site.lepton.requests[:]
    assert [status.exit_code for status in EXECUTOR.look(found)] == [0, 1, 2, 3, 4]
    pages = [path for _, path, _ in site.lepton.requests if path.startswith("/jobs?")]
    assert [re.search(r"page=(\d+)", page)[1] for page in pages] == ["1", "2"]


def test_looking_fails_as_an_executor(site: Site):
    job = site.submit("")
    site.lepton.token = "another"
    with pytest.raises(ExecutorError, match="refuses the token"):
        EXECUTOR.look([job])
    site.lepton.token = "good-token"
    site.lepton.fail_next("/jobs", 500)
    with pytest.raises(ExecutorError, match="failed with status 500. Try again"):
        EXECUTOR.look([job])
    site.lepton.down()
    with pytest.raises(ExecutorError, match="cannot be reached: connection refused"):
        EXECUTOR.look([job])


def test_a_server_that_says_nothing(site: Site, monkeypatch):
    monkeypatch.setattr("steps.dispatch.executors.lepton.client._ANSWER_SECONDS", 0.5)
    job = site.submit("")
    site.lepton.down(hang=True)
    with pytest.raises(ExecutorError, match="cannot be reached: no answer in time"):
        EXECUTOR.look([job])


def test_a_running_job_is_cancelled_and_its_step_can_end_well(site: Site):
    stop = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(130)))"
    job, _ = waiting(site, f"{stop}\n{say('one')}", secret_env={"HF_TOKEN": "hf_s3cret_value"})
    running(site, job)
    EXECUTOR.cancel(job)
    ended = site.ended(job)
    assert (ended.status.state, ended.status.reason) == ("cancelled", "stopped")
    assert (ended.directory / "log").read_text() == "one\nsaved\n"
    assert site.lepton.processes() == []
    assert site.lepton.secrets == {}
    EXECUTOR.cancel(ended)  # is left alone


def test_a_waiting_job_is_cancelled(site: Site):
    site.lepton.slow_start(1.5)
    job = site.submit(say("never"), secret_env={"HF_TOKEN": "hf_s3cret_value"})
    assert EXECUTOR.look([job])[0].state == "pending"
    EXECUTOR.cancel(job)
    assert site.ended(job).status.state == "cancelled"
    assert site.remote(job).replicas[0].process is None
    assert site.lepton.secrets == {}


def test_a_job_that_ended_meanwhile_keeps_its_end(site: Site):
    job = site.submit("")
    until(lambda: site.remote(job).state == "Completed")
    EXECUTOR.cancel(job)
    assert site.ended(job).status.state == "succeeded"


def test_cancelled_through_the_command_line(site: Site):
    site.profile(startup_commands=["echo waiting", "exec sleep 60"])
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 0, done.stderr
    done = site.steps("jobs", "cancel", "latest")
    assert done.returncode == 0, done.stderr
    assert "cancelled" in site.steps("jobs", "list").stdout
    assert site.lepton.processes() == []


def test_ctrl_c_cancels_an_attached_job(site: Site):
    site.profile(startup_commands=["echo waiting", "exec sleep 60"])
    process = site.start("run", *DEMO, "-r", "here")
    until(lambda: [job for job in site.lepton.jobs if job.replicas[0].process and not job.id.startswith("move-")])
    until(lambda: "waiting" in "".join(job.replicas[0].log.read_text() for job in site.lepton.jobs))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert site.record().status.state == "cancelled"
    assert site.lepton.processes() == []
