"""The jobs that were started from here, found again from any later shell, and what has become of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from steps.dispatch import executors, processes
from steps.dispatch.executors.base import Executor
from steps.dispatch.job import JOBS, LOST, PENDING, SUBMITTING, JobRecord, Status, read_record, read_status, utc_now
from steps.errors import StepsError, UsageError, suggest

_ID = re.compile(r"\d{8}-\d{6}-.+-[0-9a-f]{6}")
#: How long a submission may take before a job without a trace of it is given up.
_SUBMISSION_SECONDS = 60.0
#: In a job's directory from its end until what it left on the cluster has been fetched.
_UNFETCHED = ".unfetched"
#: What the note of a job begins with whose cluster did not answer.
UNREACHABLE = "not reachable: "
#: What the reason of a job begins with that never came as far as its executor.
_NEVER_SUBMITTED = ("not submitted", "stopped by the user before it was submitted", "its submission ")
_CANDIDATES = 5


def home(start: Path | None = None) -> Path:
    """The nearest .steps/jobs, upwards from here; where it would be made if there is none."""
    here = (start or Path.cwd()).absolute()
    return next((folder / JOBS for folder in (here, *here.parents) if (folder / JOBS).is_dir()), here / JOBS)


def find(name: str, *, submitted: bool = False) -> JobRecord:
    """The job of that id, of a part of it that fits only one, or in that directory. `latest` is the newest.

    submitted: `latest` is the newest that reached its executor, where one did.
    """
    if name and _is_job(Path(name)):
        return read(Path(name).absolute())
    known = ids()
    if name == "latest" and known:
        newest_first = (read(home() / identity) for identity in reversed(known))
        wanted = (record for record in newest_first if not submitted or reached(record))
        return next(wanted, None) or read(home() / known[-1])
    # The end of an id is what the list shows; the same digits may stand in the time of another.
    for fitting in (
        [entry for entry in known if entry == name],
        [entry for entry in known if name and entry.endswith(f"-{name}")],
        [entry for entry in known if name and name in entry],
    ):
        if len(fitting) == 1:
            return read(home() / fitting[0])
        if fitting:
            more = f" and {len(fitting) - _CANDIDATES} more" if len(fitting) > _CANDIDATES else ""
            shown = ", ".join(fitting[-_CANDIDATES:])
            raise UsageError(f"{name!r} could be any of {shown}{more}", hint="Write more of the id.")
    hint = suggest(name, known) or (f"The newest is {known[-1]}." if known else f"There are none in {home()}.")
    raise UsageError(f"there is no job {name!r}", hint=hint)


def reached(record: JobRecord) -> bool:
    """Whether a job came as far as its executor, or may have."""
    status = record.status
    return bool(record.executor) and not (status.ended and status.reason.startswith(_NEVER_SUBMITTED))


def by_id(identity: str, near: Path) -> JobRecord:
    """The job of that id beside the job directory `near`, or where `find` saw it from there."""
    near = near.absolute()
    for place in (near.parent, *(folder / JOBS for folder in near.parents)):
        if (place / identity).is_dir():
            return read(place / identity)
    return _wreck(near.parent / identity, Status(LOST, reason="its directory is gone"))


def ids() -> list[str]:
    """Every job here, the newest last."""

    def age(path: Path) -> tuple[int, str]:
        # The time in an id is when it was planned, a chain's all at once. job.yaml is written once, at submission.
        for file in (path / "job.yaml", path):
            with contextlib.suppress(OSError):
                return file.stat().st_mtime_ns, path.name
        return 0, path.name

    return [path.name for path in sorted((path for path in home().glob("*") if _is_job(path)), key=age)]


def _is_job(path: Path) -> bool:
    return path.is_dir() and (_ID.fullmatch(path.name) is not None or (path / "job.yaml").is_file())


def short(identity: str) -> str:
    """An id without its time: what people tell jobs apart by."""
    return identity[16:] if _ID.fullmatch(identity) else identity


def read(directory: Path) -> JobRecord:
    """The job in `directory`, also when its submission or something else left only half of one there."""
    try:
        record = read_record(directory)
    except (StepsError, ValueError, TypeError) as error:
        if (directory / "job.yaml").exists():
            return _wreck(directory, Status(LOST, reason=f"its directory is damaged: {error}"))
        if _age(directory) < _SUBMISSION_SECONDS:
            return _wreck(directory, Status(PENDING, reason=SUBMITTING))
        return _wreck(directory, Status(LOST, reason="its submission was killed before it was written down"))
    if not (record.step and record.asked.get("submitted_at") and isinstance(record.asked["resolved"], dict)):
        return _wreck(directory, Status(LOST, reason="its directory is damaged: job.yaml holds no job"))
    return record


def _wreck(directory: Path, status: Status) -> JobRecord:
    return JobRecord(directory, {"resolved": {}, "executor": "", "step": "", "profile": ""}, status)


def _age(directory: Path) -> float:
    try:
        return time.time() - directory.stat().st_mtime
    except OSError:
        return 0.0


def refresh(records: Sequence[JobRecord]) -> list[JobRecord]:
    """The same jobs as they are now, written down where that is news.

    Each cluster is asked once. What cannot be told keeps its last known state, with a note.
    """
    fresh = {record.id: record for record in records}
    groups: dict[tuple[str, str], list[JobRecord]] = {}
    for record in records:
        if record.executor and _is_open(record):
            groups.setdefault((record.executor, _place(record)), []).append(record)
    for (name, _), group in groups.items():
        for record in _look(name, group):
            fresh[record.id] = record
    return [fresh[record.id] for record in records]


def _is_open(record: JobRecord) -> bool:
    return not record.status.ended or (record.directory / _UNFETCHED).exists()


def _place(record: JobRecord) -> str:
    try:
        return executors.get(record.executor).place(record)
    except (StepsError, ValueError, OSError):  # whoever looks there says what is wrong with it
        return f"? {record.asked.get('profile')}"


def _look(name: str, group: Sequence[JobRecord]) -> Iterator[JobRecord]:
    """One question for all of them, who are in one place."""
    try:
        executor = executors.get(name)
        told = executor.look(group)
    except (StepsError, ValueError, OSError) as error:
        problem = error.problems[0].what if isinstance(error, StepsError) else str(error)
        yield from (_noted(record, UNREACHABLE + problem) for record in group)
        return
    for record, status in zip(group, told, strict=True):
        try:
            yield settle(record, status, executor)
        except StepsError as error:
            yield _noted(JobRecord(record.directory, record.asked, status), f"not fetched: {error.problems[0].what}")
        except OSError as error:
            yield _noted(JobRecord(record.directory, record.asked, status), f"not written down: {error}")


def _noted(record: JobRecord, note: str) -> JobRecord:
    return JobRecord(record.directory, record.asked, record.status, note)


def settle(record: JobRecord, status: Status, executor: Executor) -> JobRecord:
    """Write down what an executor told of a job, and fetch what it left when that is its end.

    An end is final: whoever looked before it and writes after it is wrong. Raises ExecutorError when it cannot be
    fetched (the next one to look tries again), OSError when nothing can be written.
    """
    with _alone(record.directory):
        known = read_status(record.directory)
        if known.ended:
            status = known
        elif not_submitted := _not_submitted(record, known, status):
            status = not_submitted
        status.started_at = status.started_at or known.started_at
        if status != known:
            if status.ended:
                status.ended_at = status.ended_at or ("" if status.state == LOST else utc_now())
                (record.directory / _UNFETCHED).touch()
            status.write(record.directory)
        else:
            with contextlib.suppress(OSError):  # how old the last known state is, when the cluster is out of reach
                os.utime(record.directory / "status.json")
    result = JobRecord(record.directory, record.asked, status)
    if status.ended and (record.directory / _UNFETCHED).exists():
        executor.fetch(result)
        (record.directory / _UNFETCHED).unlink(missing_ok=True)
    return result


def _not_submitted(record: JobRecord, known: Status, told: Status) -> Status | None:
    """What to believe of a job that was never seen running and that its executor cannot find: it may be on its way."""
    if known.state != PENDING or (known.handle and known.reason != SUBMITTING):
        return None
    if told.state == LOST or (told.state == PENDING and not told.handle):
        if _is_being_submitted(record):
            return known
        return told if told.state == LOST else Status(LOST, reason="its submission died before the job was started")
    return None


def _is_being_submitted(record: JobRecord) -> bool:
    by, at = record.asked.get("submitted_by") or {}, str(record.asked.get("submitted_at") or "")
    try:
        age = (datetime.now(timezone.utc) - datetime.fromisoformat(at)).total_seconds()
    except (ValueError, TypeError):
        age = _age(record.directory)
    here = by.get("host") == processes.host()
    return age < _SUBMISSION_SECONDS or (here and processes.lives(int(by.get("pid", 0)), str(by.get("started", ""))))


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time decides what a job's status is, where the file system can lock a directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
