"""The pure half of `steps jobs`: the end of a log, times, rows."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.dispatch import jobs
from steps.dispatch.job import JobRecord, Status
from steps.dispatch.jobs import listing
from steps.dispatch.jobs import view as jobs_view
from steps.errors import UsageError

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
    record = JobRecord(Path("x"), {}, Status("pending", reason="Priority"), note="not fetched: x")
    assert jobs_view.told(record) == "pending: Priority (not fetched: x)"


def test_a_reason_that_only_repeats_the_state_is_left_out():
    assert jobs_view.told(JobRecord(Path("x"), {}, Status("cancelled", reason="CANCELLED"))) == "cancelled"


IDS = [f"20260101-00000{number}-data_prep-demo_chat-{end}" for number, end in enumerate(("aaaaaa", "bbbbbb", "cccccc"))]


def record(identity: str = IDS[0], status: Status | None = None, **more) -> JobRecord:
    asked = {"executor": "slurm", "step": "data_prep/demo_chat", "profile": "slurm_prep_demo_chat", "resolved": {}}
    asked |= {"submitted_at": "2026-01-01T00:00:00+00:00"} | more
    return JobRecord(Path("nowhere") / identity, asked, status or Status("succeeded"))


@pytest.mark.parametrize("columns", [40, 80, 100, 160, 100_000])
def test_the_list_has_one_line_a_job_and_none_wider_than_the_terminal(monkeypatch, columns):
    monkeypatch.setattr(listing, "width", lambda: columns)
    reason = f"Slurm knows no job named {IDS[1]}:\n it was never submitted, or is long forgotten " + "x" * 200
    lines = list(listing.listing([record(), record(IDS[1], Status("lost", reason=reason))]))
    assert len(lines) == 3
    assert all(len(line) <= columns for line in lines)
    assert lines[1].startswith("aaaaaa  ")
    if columns >= 80:
        step = "demo_chat" if columns < 120 else "data_prep/demo_chat"  # the reason needs the room
        assert lines[1].endswith(f"succeeded  {step}  slurm_prep_demo_chat")
        assert f"lost       {step}  slurm_pre" in lines[2]
        assert lines[2].endswith("…") == (columns < 1000)
    if columns > 1000:
        assert lines[2].endswith(
            "Slurm knows no job named bbbbbb: it was never submitted, or is long forgotten " + "x" * 200
        )


def test_a_list_that_fits_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr(listing, "width", lambda: 80)
    row = list(listing.listing([record()]))[1]
    assert row.endswith("-     succeeded  data_prep/demo_chat  slurm_prep_demo_chat")
    assert len(row) <= 80


def test_an_id_is_longer_where_two_share_its_end():
    one, two, three, four = (
        "20260101-000000-a-aaaaaa", "20260101-000001-b-aaaaaa", "20260101-000002-b-bbbbbb", "20260101-000003-a-aaaaaa"
    )  # fmt: skip
    assert listing.short_names([one, two, three, four, "mine-1"]) == {
        one: one, two: "b-aaaaaa", three: "bbbbbb", four: four, "mine-1": "mine-1",
    }  # fmt: skip


def test_the_log_names_the_cause_behind_an_exit_code(tmp_path):
    status = Status("failed", exit_code=4, reason="exit code 4")
    failed = JobRecord(tmp_path, {"executor": "local"}, status)
    assert jobs_view.told(failed) == "failed: exit code 4"
    (tmp_path / "log").write_text("x" * 100_000 + "\nerror: first\nerror: there is no data\n  more\nan error: no\n")
    assert jobs_view.told(failed) == "failed: exit code 4: there is no data"
    status.reason = "OUT_OF_MEMORY"
    assert jobs_view.told(failed) == "failed: OUT_OF_MEMORY"


def test_a_state_that_cannot_be_asked_says_how_old_it_is(tmp_path):
    out_of_reach = JobRecord(tmp_path, {}, Status("running"), note="not reachable: x")
    assert jobs_view.told(out_of_reach) == "running (not reachable: x)"
    (tmp_path / "status.json").touch()
    os.utime(tmp_path / "status.json", (0, time.mktime((2020, 1, 2, 3, 4, 5, 0, 0, -1))))
    assert jobs_view.told(out_of_reach) == "running, as of 2020-01-02 03:04:05 (not reachable: x)"


NOT_SUBMITTED = Status("failed", reason="not submitted: no such partition")


def test_a_job_that_was_never_submitted_can_only_be_run_again():
    assert list(jobs_view.next_commands(record(status=NOT_SUBMITTED))) == ["steps jobs rerun aaaaaa"]


def test_a_job_that_waited_in_vain_names_the_one_it_waited_for(tmp_path):
    home = tmp_path / ".steps" / "jobs"
    write(home / IDS[0], Status("failed", exit_code=1, reason="exit code 1"))
    last = write(home / IDS[1], Status("cancelled", reason="DependencyNeverSatisfied"), after=[IDS[0]])
    assert jobs_view.told(last) == "cancelled: DependencyNeverSatisfied: data_prep-demo_chat-aaaaaa is failed"
    assert list(listing.listing([last], IDS))[1].endswith("DependencyNeverSatisfied: aaaaaa is failed")
    assert list(jobs_view.next_commands(last)) == ["steps jobs rerun bbbbbb"]
    assert f"after       {IDS[0]} (failed)" in "\n".join(jobs_view.page(last, jobs_view.data(last) | NOTHING_MORE))


NOTHING_MORE = {"progress": None, "summary": None, "log_tail": None, "next": []}


def test_the_page_shows_the_place_on_the_cluster_and_no_handle():
    status = Status("succeeded", handle={"slurm_job_id": "27", "directory": "/there/x"})
    page = "\n".join(jobs_view.page(record(status=status), jobs_view.data(record(status=status)) | NOTHING_MORE))
    assert "on cluster  /there/x" in page
    assert "(slurm) 27" in page
    assert "handle" not in page
    assert "slurm_job_id" not in page


def write(directory: Path, status: Status, **more) -> JobRecord:
    """A job on disk."""
    directory.mkdir(parents=True)
    (directory / "job.yaml").write_text(json.dumps(dict(record(**more).asked)))
    status.write(directory)
    return jobs.read(directory)


def test_latest_can_mean_the_latest_that_was_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for identity, status in zip(IDS, (Status("running"), Status("failed"), NOT_SUBMITTED), strict=True):
        write(Path(".steps/jobs") / identity, status)
        time.sleep(0.02)
    assert jobs.find("latest").id == IDS[2]
    assert jobs.find("latest", submitted=True).id == IDS[1]


def test_a_part_of_an_id_that_fits_many_names_a_few_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        write(Path(".steps/jobs") / f"20260101-0000{number:02}-data_prep-demo_chat-{number:06x}", Status())
    with pytest.raises(UsageError) as caught:
        jobs.find("demo_chat")
    assert str(caught.value).count("20260101") == 5
    assert "and 7 more" in str(caught.value)
    # The end that the list shows wins over the same digits in the time of another.
    assert jobs.find("000003").id.endswith("-000003")
