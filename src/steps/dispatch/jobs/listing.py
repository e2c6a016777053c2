"""The screen of `steps jobs list`: one line for each job, never wider than the terminal, never cut in a pipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from steps.dispatch.job import JobRecord
from steps.dispatch.jobs import short
from steps.dispatch.jobs.view import reason, submitted, took
from steps.dispatch.render import bold, width

_GAP = "  "
#: How many columns, from the left, are never cut.
_FIXED = 5
#: What a profile's name keeps where the reason beside it needs the room.
_LEAST_PROFILE = 10
#: How much of a reason is worth more than the category of a step.
_READABLE = 40


def listing(records: Sequence[JobRecord], known: Iterable[str] = ()) -> Iterator[str]:
    """A line for each job. known: the ids of all jobs that there are, which say how short an id may be."""
    names = short_names({*known, *(record.id for record in records)})
    now = datetime.now().astimezone()
    header = ("JOB", f"WHEN ({now.tzname()})", "TOOK", "STATE", "STEP", "PROFILE", "REASON")
    rows = [header, *(_row(record, names, now) for record in records)]
    explained = [row for row in rows if row[6]]  # the others have room for any name of a profile
    profile, why = (max(len(row[column]) for row in explained) for column in (5, 6))
    room = max(profile + len(_GAP) + min(why, _READABLE), *(len(row[5]) for row in rows))
    if _left(rows) + room > width():  # a step's last name tells as much
        rows = [(*row[:4], row[4].rpartition("/")[2], *row[5:]) for row in rows]
        profile = min(profile, max(_LEAST_PROFILE, (width() - _left(rows)) // 3))
    sizes = _sizes(rows)
    for number, row in enumerate(rows):
        left = _GAP.join(cell.ljust(size) for cell, size in zip(row[:_FIXED], sizes, strict=False))
        right = f"{_cut(row[5], profile).ljust(profile)}{_GAP}{row[6]}" if row[6] else row[5]
        line = _cut(f"{left}{_GAP}{right}".rstrip(), width())
        yield bold(line) if number == 0 else line


def _sizes(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(_FIXED)]


def _left(rows: Sequence[Sequence[str]]) -> int:
    """Columns in front of the profile's."""
    return sum(_sizes(rows)) + _FIXED * len(_GAP)


def short_names(identities: Iterable[str]) -> dict[str, str]:
    """What to call each job: the random end of its id; more of it where two share that."""
    ids = list(identities)
    ends, longer = Counter(map(_end, ids)), Counter(map(short, ids))
    return {
        name: _end(name) if ends[_end(name)] == 1 else short(name) if longer[short(name)] == 1 else name for name in ids
    }


def _end(identity: str) -> str:
    return identity.rpartition("-")[2] if short(identity) != identity else identity


def _row(record: JobRecord, names: Mapping[str, str], now: datetime) -> tuple[str, ...]:
    why = reason(record)
    for identity, name in names.items():
        why = why.replace(identity, name).replace(short(identity), name)
    asked = record.asked
    return (
        names[record.id], _when(record, now), took(record), record.status.state,
        record.step or "?", str(asked.get("profile") or "?"), " ".join(why.split()),
    )  # fmt: skip


def _when(record: JobRecord, now: datetime) -> str:
    time = submitted(record)
    if not time:
        return "?"
    local = time.astimezone()
    return local.strftime("%m-%d %H:%M" if local.year == now.year else "%Y-%m-%d")


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(0, room - 1)] + "…"
