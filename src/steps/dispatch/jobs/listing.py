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
#: What a profile's name keeps where the reason beside it needs the room.
_LEAST_PROFILE = 10


def listing(records: Sequence[JobRecord], known: Iterable[str] = ()) -> Iterator[str]:
    """A line for each job. known: the ids of all jobs that there are, which say how short an id may be."""
    names = short_names({*known, *(record.id for record in records)})
    now = datetime.now().astimezone()
    header = ("JOB", f"WHEN ({now.tzname()})", "TOOK", "STATE", "STEP", "PROFILE", "REASON")
    rows = [header, *(_row(record, names, now) for record in records)]
    sizes = [max(len(row[column]) for row in rows) for column in range(len(header))]
    room = width() - sum(sizes[:5]) - 5 * len(_GAP)
    profile = sizes[5] if sizes[5] + len(_GAP) + sizes[6] <= room else min(sizes[5], max(_LEAST_PROFILE, room // 3))
    for number, row in enumerate(rows):
        left = _GAP.join(cell.ljust(size) for cell, size in zip(row[:5], sizes, strict=False))
        # Without a reason to show there is room for the whole name of the profile.
        right = f"{_cut(row[5], profile).ljust(profile)}{_GAP}{row[6]}" if row[6] else row[5]
        line = _cut(f"{left}{_GAP}{right}".rstrip(), width())
        yield bold(line) if number == 0 else line


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
        why = why.replace(identity, name)
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
