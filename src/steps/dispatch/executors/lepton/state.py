"""What has become of a job: Lepton's states and counts, and the last lines of its log, in our vocabulary. Pure."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from steps.dispatch.executors.lepton.trailer import Trailer
from steps.dispatch.job import CANCELLED, FAILED, LOST, PENDING, RUNNING, SUBMITTING, SUCCEEDED, Status

_WAITING = frozenset({"Queueing", "Awaiting", "Starting", "Restarting", "PendingRetry"})
_GOING = frozenset({"Running", "Stopping", "Deleting"})
_DELETED = frozenset({"Deleted", "Archived"})
ENDED = frozenset({"Completed", "Failed", "Stopped"}) | _DELETED


def word(job: Any) -> str:
    """Lepton's own word for the job's state; UNK for one that the client does not know."""
    state = job.status.state if job.status else None
    return str(getattr(state, "value", state) or "UNK")


def status(job: Any, known: Status, trailer: Trailer) -> Status:
    """The job's status. known: what was written down before; trailer: of a job that has ended."""
    state = word(job)
    result = Status(handle=known.handle, started_at=known.started_at)
    if state in _DELETED and known.ended:
        return known
    if state in _WAITING or (state == "Running" and (job.status.ready or 0) < (job.status.active or 0)):
        result.state, result.reason = PENDING, state if state in _WAITING else _waits_for_workers(job)
    elif state in _GOING:
        result.state, result.reason = RUNNING, "" if state == "Running" else state
    elif state in ENDED:
        _end(result, state, job, trailer)
    else:
        result.state, result.reason = known.state, f"Lepton calls its state {state}"
    return result


def gone(known: Status) -> Status:
    """The status of a job that the workspace does not know."""
    if known.ended:
        return known
    never = known.reason == SUBMITTING
    reason = "its submission was cut off before Lepton had it" if never else "Lepton does not know it any more"
    return Status(LOST, reason=reason, started_at=known.started_at, handle=known.handle)


def _waits_for_workers(job: Any) -> str:
    return f"Starting: {job.status.ready or 0} of {job.spec.completions or 1} workers"


def _end(result: Status, state: str, job: Any, trailer: Trailer) -> None:
    counts, workers = job.status, job.spec.completions or 1
    succeeded, failed = counts.succeeded or 0, counts.failed or 0
    result.started_at = trailer.started_at or result.started_at
    result.ended_at = trailer.ended_at or _time(counts.completion_time)
    if state == "Completed" or (state in _DELETED and succeeded >= workers and not failed):
        result.state, result.exit_code = SUCCEEDED, 0
    elif state == "Stopped":
        result.state, result.exit_code, result.reason = CANCELLED, 130, "stopped"
    elif state in _DELETED and not failed:
        result.state, result.reason = CANCELLED, f"deleted from the workspace ({state})"
    elif trailer.exit_code:
        result.state, result.exit_code = FAILED, trailer.exit_code
        result.reason = f"exit code {trailer.exit_code}" + (f" of worker {trailer.worker}" if workers > 1 else "")
    else:
        result.state = FAILED
        if state in _DELETED:
            result.reason = f"{failed} of {workers} workers had failed, then it was deleted ({state})"
        elif trailer.worker < 0:
            result.reason = f"{state}: no worker has started"
        else:
            who = f"worker {trailer.worker}" if workers > 1 else "it"
            result.reason = f"{state}: {who} was killed (out of memory?), or its node was lost"


def _time(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")
