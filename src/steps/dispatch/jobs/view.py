"""Jobs as a person reads them (`steps jobs list`, `steps jobs status`), and as data."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

from steps.dispatch import executors
from steps.dispatch.job import CANCELLED, FAILED, LOST, PENDING, RUNNING, SUCCEEDED, JobRecord, Status
from steps.dispatch.jobs import UNREACHABLE, by_id, reached, short
from steps.dispatch.render import bold, section
from steps.errors import StepsError

TAIL_LINES = 20
_UNDONE = (FAILED, CANCELLED, LOST)
_ERROR, _AS_OF = "error: ", "as of "
#: How much of the end of a log is searched for the error that ended the job.
_CAUSE_BYTES = 1 << 16


def where(record: JobRecord) -> str:
    """The profile, the executor behind it, and the job's number there."""
    profile, executor = str(record.asked.get("profile") or "?"), record.executor
    name = profile if executor in ("", profile) else f"{profile} ({executor})"
    return f"{name} {number(record.status)}".rstrip()


def number(status: Status) -> str:
    """What the cluster calls the job; '' when it has no name for it."""
    return next((str(value) for key, value in status.handle.items() if key.endswith("job_id")), "")


def told(record: JobRecord) -> str:
    """The state, and why; what is uncertain about it."""
    why = reason(record)
    if not why:
        return record.status.state
    between = ", " if why.startswith(_AS_OF) else " " if why.startswith("(") else ": "
    return f"{record.status.state}{between}{why}"


def reason(record: JobRecord) -> str:
    """Why a job waits or ended as it did, with the cause that its log names; what is uncertain about it."""
    status, note = record.status, record.note
    words = "" if status.reason.lower() == status.state else status.reason  # Slurm's word for cancelled is CANCELLED
    if words == "DependencyNeverSatisfied" and (culprit := _culprit(record)):
        words = f"{words}: {culprit}"
    if status.state == FAILED and words == f"exit code {status.exit_code}" and (said := cause(record)):
        words = f"{words}: {said}"
    if note.startswith(UNREACHABLE):
        note, since = f"({note})", as_of(record)
        return f"{words}, {since} {note}" if words and since else " ".join(filter(None, (words, since, note)))
    return " ".join(filter(None, (words, f"({note})" if note else "")))


def as_of(record: JobRecord) -> str:
    """When the last known state was seen; '' where that is not known."""
    try:
        seen = (record.directory / "status.json").stat().st_mtime
    except OSError:
        return ""
    time = datetime.fromtimestamp(seen).astimezone()
    today = time.date() == datetime.now().astimezone().date()
    return _AS_OF + time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def cause(record: JobRecord) -> str:
    """The last error that the log of a job names, where the log is here; ''."""
    try:
        with (record.directory / "log").open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _CAUSE_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line[len(_ERROR) :].strip() for line in reversed(lines) if line.startswith(_ERROR)), "")


def took(record: JobRecord) -> str:
    """How long it ran, so far or in all; '-' where nobody knows."""
    begin, end = _parsed(record.status.started_at), _parsed(record.status.ended_at)
    if begin and not end and record.status.state == RUNNING and not record.note:
        end = datetime.now(timezone.utc)
    return _duration((end - begin).total_seconds()) if begin and end else "-"


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s"))
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2])


def _parsed(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def submitted(record: JobRecord) -> datetime | None:
    """When it was submitted, as far as that was written down."""
    return _parsed(_submitted(record))


def _local_time(text: str) -> str:
    time = _parsed(text)
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else text or "?"


def _submitted(record: JobRecord) -> str:
    return str(record.asked.get("submitted_at") or "")


def data(record: JobRecord) -> dict[str, Any]:
    """A job as data, for `--json`."""
    status = record.status
    return {
        "id": record.id, "step": record.step, "config": record.asked.get("config", ""),
        "profile": record.asked.get("profile", ""), "executor": record.executor, "state": status.state,
        "reason": status.reason, "note": record.note, "exit_code": status.exit_code,
        "submitted_at": _submitted(record), "started_at": status.started_at, "ended_at": status.ended_at,
        "after": list(record.asked.get("after") or ()), "handle": status.handle, "directory": str(record.directory),
    }  # fmt: skip


def details(record: JobRecord) -> dict[str, Any]:
    """The same with all that its directory and its log tell."""
    failed = record.status.state in (FAILED, LOST) and reached(record)
    return {
        **data(record),
        "progress": None if record.status.state == SUCCEEDED else _file(record, "progress.json"),
        "summary": _file(record, "summary.json") if record.status.state == SUCCEEDED else None,
        "log_tail": tail(record) if failed else None,
        "next": list(next_commands(record)),
    }


def page(record: JobRecord, known: dict[str, Any]) -> Iterator[str]:
    """Everything about one job. known: `details` of it."""
    status = record.status
    yield f"{bold(record.id)}  {told(record)}"
    facts = {
        "step": f"{record.step or '?'}" + (f" -c {known['config']}" if known["config"] else ""),
        "where": where(record),
        "exit code": "" if status.exit_code is None else str(status.exit_code),
        "submitted": _local_time(_submitted(record)),
        "started": _local_time(status.started_at) if status.started_at else "",
        "ended": _local_time(status.ended_at) if status.ended_at else "",
        "took": took(record) if took(record) != "-" else "",
        "after": ", ".join(_ahead(record)),
        "directory": known["directory"],
        "on cluster": str(status.handle.get("directory") or "") if reached(record) else "",
        "progress": _progress(known["progress"]),
    }
    yield from (f"  {name:<10}  {value}" for name, value in facts.items() if value)
    if known["summary"]:
        yield from section("Result")
        yield from (f"  {name.replace('_', ' ')}: {value}" for name, value in known["summary"].items())
    if known["log_tail"]:
        yield from section(f"The last lines of its log ({TAIL_LINES} at most)")
        yield from known["log_tail"]
    yield from section("Next")
    yield from (f"  {command}" for command in known["next"])


def _culprit(record: JobRecord) -> str:
    """The job for which this one waited in vain; ''."""
    others = [by_id(name, record.directory) for name in record.asked.get("after") or ()]
    return next((f"{short(one.id)} is {one.status.state}" for one in others if one.status.state in _UNDONE), "")


def _ahead(record: JobRecord) -> Iterator[str]:
    """The jobs that it waits for; what became of them, where that is why it will not run."""
    for name in record.asked.get("after") or ():
        state = by_id(name, record.directory).status.state if record.status.state in _UNDONE else ""
        yield f"{name} ({state})" if state else name


def next_commands(record: JobRecord) -> Iterator[str]:
    """What one would type now."""
    name = record.id.rpartition("-")[2]
    if not record.executor:
        yield f"rm -r {record.directory}"
    elif not reached(record):
        yield f"steps jobs rerun {name}"
    elif record.note.startswith(UNREACHABLE):
        yield f"steps jobs status {name}"
    elif record.status.state in (PENDING, RUNNING):
        yield f"steps jobs logs -f {name}"
        yield f"steps jobs cancel {name}"
    else:
        if record.status.started_at or record.status.state != CANCELLED:  # otherwise it never said anything
            yield f"steps jobs logs {name}"
        if record.status.state != SUCCEEDED:
            yield f"steps jobs rerun {name}"


def tail(record: JobRecord, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a job's log; why there are none, where its executor cannot tell."""
    try:
        with closing(executors.get(record.executor).logs(record, follow=False)) as pieces:  # type: ignore[type-var]
            return [line.decode(errors="replace") for line in last_lines(pieces, lines).splitlines()]
    except (StepsError, OSError) as error:
        return [f"(its log cannot be read: {error})"]


def last_lines(pieces: Iterable[bytes], lines: int) -> bytes:
    """The end of what the pieces make together, without holding all of it."""
    kept: deque[bytes] = deque(maxlen=max(lines, 0))
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        kept.extend(line + b"\n" for line in whole)
    if rest:
        kept.append(rest)
    return b"".join(kept)


def before_last_lines(pieces: Iterable[bytes], lines: int) -> int:
    """The number of bytes in front of them."""
    size = 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for piece in pieces:
            size += len(piece)
            yield piece

    end = last_lines(counted(), lines)
    return size - len(end)


def _file(record: JobRecord, name: str) -> Any:
    try:
        return json.loads((record.directory / name).read_text())
    except (OSError, ValueError):
        return None


def _progress(state: Any) -> str:
    if not isinstance(state, dict) or "task" not in state:
        return ""
    total = f" of {state['total']:,.0f}" if state.get("total") else ""
    fields = "".join(f", {key} {value}" for key, value in (state.get("fields") or {}).items())
    return f"{state['task']}: {state.get('done', 0):,.0f}{total} {state.get('unit', '')}{fields}"
