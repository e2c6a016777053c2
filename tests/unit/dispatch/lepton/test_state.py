"""Lepton's words in ours: the states that a workspace on this machine does not go through."""

from __future__ import annotations

import pytest

from steps.dispatch.executors.lepton import state
from steps.dispatch.executors.lepton.trailer import Trailer
from steps.dispatch.job import SUBMITTING, Status

pytest.importorskip("leptonai", reason="leptonai is not installed (pip install 'peft-steps[cluster]')")
HANDLE = {"lepton_job_id": "a-job"}


def job(word: str, workers: int = 1, **counts: int):
    from leptonai.api.v1.types.job import LeptonJob

    fields = {"metadata": {"id": "a-job"}, "spec": {"completions": workers}, "status": {"state": word, **counts}}
    return LeptonJob.model_validate(fields)


def seen(found, known: Status | None = None, trailer: Trailer | None = None) -> tuple[str, int | None, str]:
    status = state.status(found, known or Status(handle=HANDLE), trailer or Trailer())
    assert status.handle == HANDLE
    return status.state, status.exit_code, status.reason


@pytest.mark.parametrize("word", ["Queueing", "Awaiting", "Starting", "Restarting", "PendingRetry"])
def test_a_job_that_waits_says_why(word):
    assert seen(job(word)) == ("pending", None, word)


def test_a_job_runs_when_all_of_its_workers_do():
    assert seen(job("Running", 4, ready=3, active=4)) == ("pending", None, "Starting: 3 of 4 workers")
    assert seen(job("Running", 4, ready=4, active=4)) == ("running", None, "")


@pytest.mark.parametrize("word", ["Stopping", "Deleting"])
def test_a_job_that_is_being_ended_still_runs(word):
    assert seen(job(word)) == ("running", None, word)


@pytest.mark.parametrize("known", ["pending", "running"])
def test_a_word_that_the_client_does_not_know_changes_nothing(known):
    assert seen(job("Hibernating"), Status(known, handle=HANDLE)) == (known, None, "Lepton calls its state UNK")


@pytest.mark.parametrize("word", ["Archived", "Deleted"])
@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"succeeded": 2}, ("succeeded", 0, "")),
        ({"succeeded": 1, "failed": 1}, ("failed", None, "1 of 2 workers had failed, then it was deleted ({})")),
        ({"succeeded": 1}, ("cancelled", None, "deleted from the workspace ({})")),
        ({}, ("cancelled", None, "deleted from the workspace ({})")),
    ],
)
def test_of_a_deleted_job_the_counts_tell(word, counts, expected):
    state_, code, reason = expected
    assert seen(job(word, 2, **counts)) == (state_, code, reason.format(word))


def test_a_failed_job():
    failed = job("Failed", 2, failed=1, completion_time=1_767_323_045_000)
    assert seen(failed, trailer=Trailer(3, 1)) == ("failed", 3, "exit code 3 of worker 1")
    assert seen(failed, trailer=Trailer(worker=-1)) == ("failed", None, "Failed: no worker has started")
    assert "worker 0 was killed" in seen(failed)[2]
    assert state.status(failed, Status(), Trailer()).ended_at == "2026-01-02T03:04:05+00:00"
    told = state.status(failed, Status(started_at="seen"), Trailer(3, 0, "began", "ended"))
    assert (told.started_at, told.ended_at) == ("began", "ended")


def test_a_job_that_is_not_there():
    submitting = state.gone(Status(reason=SUBMITTING, handle=HANDLE))
    assert (submitting.state, submitting.reason) == ("lost", "its submission was cut off before Lepton had it")
    assert state.gone(Status("running", handle=HANDLE)).reason == "Lepton does not know it any more"
    assert state.gone(Status("failed", 3)) == Status("failed", 3)
