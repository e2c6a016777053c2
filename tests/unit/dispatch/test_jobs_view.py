"""The pure half of `steps jobs`: the end of a log, times, rows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.dispatch.job import JobRecord, Status
from steps.dispatch.jobs import view as jobs_view

PIECES = st.lists(st.binary(max_size=6).map(lambda data: data.replace(b"\1", b"\n")), max_size=8)


@given(pieces=PIECES, lines=st.integers(0, 5))
def test_the_last_lines_are_those_of_tail(pieces, lines):
    whole = b"".join(pieces)
    expected = subprocess.run(["tail", "-n", str(lines)], input=whole, capture_output=True, check=True).stdout
    assert jobs_view.last_lines(pieces, lines) == expected
    assert whole[jobs_view.before_last_lines(pieces, lines) :] == expected


@pytest.mark.parametrize(
    ("begin", "end", "told"),
    [
        ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00", "0s"),
        ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:59+00:00", "59s"),
        ("2026-01-01T00:00:00+00:00", "2026-01-01T01:00:59+00:00", "1h 0m"),
        ("2026-01-01T00:00:00+00:00", "2026-01-03T23:59:59+00:00", "2d 23h"),
        ("2026-01-01T00:00:00", "2026-01-01T02:01:00+01:00", "1h 1m"),  # without a zone: UTC
        ("", "2026-01-01T00:00:00+00:00", "-"),
        ("2026-01-01T00:00:00+00:00", "", "-"),
        ("nonsense", "2026-01-01T00:00:00+00:00", "-"),
    ],
)
def test_how_long_it_took(begin, end, told):
    record = JobRecord(Path("x"), {"executor": "local"}, Status("failed", started_at=begin, ended_at=end))
    assert jobs_view.took(record) == told


def test_where_names_the_profile_the_executor_and_the_number_there():
    def where(profile: str, executor: str, **handle: object) -> str:
        asked = {"profile": profile, "executor": executor}
        return jobs_view.where(JobRecord(Path("x"), asked, Status(handle=handle)))

    assert where("big", "slurm", slurm_job_id="17", directory="/d") == "big (slurm) 17"
    assert where("local", "local", pid=17) == "local"
    assert where("", "") == "?"


def test_what_is_uncertain_stands_beside_the_state():
    record = JobRecord(Path("x"), {}, Status("pending", reason="Priority"), note="not reachable: x; last known")
    assert jobs_view.told(record) == "pending: Priority (not reachable: x; last known)"


def test_a_reason_that_only_repeats_the_state_is_left_out():
    assert jobs_view.told(JobRecord(Path("x"), {}, Status("cancelled", reason="CANCELLED"))) == "cancelled"
