"""What Slurm's commands and a job's own files say about it, read, and judged in one vocabulary. Asks nobody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from steps.dispatch.job import CANCELLED, FAILED, LOST, PENDING, RUNNING, SUCCEEDED, Status

#: Formats to ask for; the name stands last, because it may hold the separator. Times are asked for with TZ=UTC0.
SQUEUE_FORMAT = "%i|%T|%r|%S|%e|%j"
SACCT_FORMAT = "JobIDRaw,State,ExitCode,Reason,Start,End,JobName"

#: https://slurm.schedmd.com/job_state_codes.html. What is in none of these has ended, and badly.
_PENDING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
_RUNNING = frozenset(
    {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "EXPEDITING"}
)
_CANCELLED = frozenset({"CANCELLED", "REVOKED"})
_NEVER = "DependencyNeverSatisfied"
#: slurmstepd's own code for a batch script whose output file or spool could not be opened.
_NOT_LAUNCHED = 53


@dataclass(frozen=True)
class Row:
    """One job, as one of Slurm's commands tells it. exit_code and signal: the two halves of Slurm's `a:b`."""

    id: str
    name: str
    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    started_at: str = ""
    ended_at: str = ""

    @property
    def word(self) -> str:
        """The state without what follows it: CANCELLED for `CANCELLED by 1000`."""
        return self.state.split(" ")[0].rstrip("+")

    @property
    def ended(self) -> bool:
        return self.word not in _PENDING and self.word not in _RUNNING


@dataclass(frozen=True)
class Files:
    """What the batch script left in the job's directory on the cluster; '' and None for what is not there."""

    slurm_job_id: str = ""
    started_at: str = ""
    ended_at: str = ""
    exit_code: int | None = None


def squeue_rows(text: str) -> Iterator[Row]:
    """Lines of `squeue --noheader --format SQUEUE_FORMAT`."""
    for line in text.splitlines():
        fields = line.split("|", 5)
        if len(fields) == 6 and fields[0].isdigit():
            id, state, reason, start, end, name = fields
            yield Row(id, name, state, _reason(reason), started_at=_time(start), ended_at=_time(end))


def sacct_rows(text: str) -> Iterator[Row]:
    """Lines of `sacct --noheader --allocations --parsable2 --format SACCT_FORMAT`."""
    for line in text.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7 and fields[0].isdigit():
            id, state, code, reason, start, end, name = fields
            if (state, reason) == ("CANCELLED", "Dependency"):  # by nobody: accounting keeps the older reason
                reason = _NEVER
            yield Row(id, name, state, _reason(reason), *_exit_code(code), _time(start), _time(end))


def scontrol_rows(text: str) -> Iterator[Row]:
    """Lines of `scontrol --oneliner show job ID`. A name may hold spaces and `=`."""
    shape = re.compile(r"JobId=(\d+) (?:Array\S+ )*(?:Het\S+ )*JobName=(.*?) UserId=\S+\(\d+\) (.*)")
    for line in text.splitlines():
        if match := shape.match(line):
            id, name, rest = match.groups()
            fields = dict(part.split("=", 1) for part in rest.split(" ") if "=" in part)
            yield Row(
                id, name, fields.get("JobState", ""), _reason(fields.get("Reason", "")),
                *_exit_code(fields.get("ExitCode", "0:0")),
                _time(fields.get("StartTime", "")), _time(fields.get("EndTime", "")),
            )  # fmt: skip


def judge(files: Files, row: Row | None) -> Status | None:
    """What has become of a job; None when neither says anything.

    Its own exit code comes first; for a bad one Slurm's verdict, where there is one, is the better reason.
    """
    code = files.exit_code
    if code == 0:
        return Status(SUCCEEDED, 0, "", files.started_at, files.ended_at or (row.ended_at if row else ""))
    if code is not None and (row is None or not row.ended or row.word == "COMPLETED"):
        return Status(FAILED, code, _of_code(code), files.started_at, files.ended_at)
    if row is None:
        return None
    if not row.ended:
        if row.word in _PENDING:
            return Status(PENDING, None, row.reason if row.word == "PENDING" else row.word)
        reason = "" if row.word == "RUNNING" else row.word
        return Status(RUNNING, None, reason, files.started_at or row.started_at)
    started = files.started_at or (row.started_at if row.started_at != row.ended_at else "")
    ended = files.ended_at or row.ended_at
    if row.word == "COMPLETED":
        return Status(SUCCEEDED, 0, "", started or row.started_at, ended)
    # Larger numbers are no signals: 125 is Slurm's mark of a job that was out of memory.
    slurms = row.exit_code or (128 + row.signal if 0 < row.signal <= 64 else 0)
    if row.word in _CANCELLED:
        reason = _NEVER if row.reason == _NEVER else row.state
        return Status(CANCELLED, code or slurms or None, reason, started, ended)
    return Status(FAILED, code or slurms or 1, _of_failure(row, code or slurms), started, ended)


def lost(slurm_job_id: str, name: str) -> Status:
    """A job that nobody knows anything about."""
    if slurm_job_id:
        return Status(LOST, reason=f"Slurm no longer knows job {slurm_job_id}, and it left no exit code")
    return Status(LOST, reason=f"Slurm knows no job named {name}: it was never submitted, or is long forgotten")


def _of_failure(row: Row, code: int) -> str:
    if row.word != "FAILED":
        return row.word
    if row.signal == _NOT_LAUNCHED:
        return f"{row.reason or 'JobLaunchFailure'}: Slurm could not start it (is its directory writable on the nodes?)"
    return _of_code(code) if code else row.reason or row.word


def _of_code(code: int) -> str:
    """A shell's word for an exit code: 128 + n for signal n."""
    return f"killed by signal {code - 128}" if 128 < code <= 128 + 64 else f"exit code {code}"


def _exit_code(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+):(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _reason(text: str) -> str:
    """Slurm's word, or a sentence in place of one, which scontrol writes with underscores."""
    if text in ("None", "(null)", "N/A"):
        return ""
    return text.replace("_", " ") if ",_" in text else text


def _time(text: str) -> str:
    """'2026-11-22T06:44:43' (asked for in UTC) as the project writes times; '' for Unknown, N/A, None."""
    return f"{text}+00:00" if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text) else ""
