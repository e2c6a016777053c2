"""Following, cancelling and fetching jobs of a real Slurm, here and through ssh."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from statistics import median

import pytest
from support.slurm_jobs import number, there

from steps.dispatch.executors.slurm import follow
from steps.dispatch.executors.slurm.follow import cancel, fetch, logs
from steps.dispatch.executors.slurm.state import look
from steps.dispatch.job import LOST, SUBMITTING
from steps.errors import ExecutorError

#: Each line tells when it was written.
TICKS = 'for i in {1..12}; do echo "$i $(date +%s.%N)"; sleep 0.4; done'


def read(job) -> bytes:
    return b"".join(logs(job, follow=True))


def test_lines_arrive_while_the_job_runs(place):
    """Each within two seconds, from a job that waits at first; the end of the job ends it."""
    job = place.submit(f"srun bash -c '{TICKS}'", "--hold")
    delays, longest, began = [], 0.0, time.monotonic()
    for piece in logs(job, follow=True):
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
        if not delays and place.cluster.show(number(job))["JobState"] == "PENDING":
            place.cluster.run("scontrol", "release", str(number(job)), check=True)
        delays += [time.time() - float(line.split()[1]) for line in piece.splitlines()]
    end = time.time()
    assert len(delays) == 12
    assert median(delays) < 2, delays
    assert longest < 1.5, "something comes every second"
    assert look([job])[0].state == "succeeded"
    ended = (there(job) / "exit_code").stat().st_mtime
    print(f"line written -> seen: at most {max(delays):.2f} s; job's end -> seen: {end - ended:.2f} s")
    assert end - ended < 4


def test_what_is_there_now(place):
    job = place.submit("echo one; srun sleep 60")
    while b"one" not in b"".join(logs(job, follow=False)):
        time.sleep(0.1)
    assert b"".join(logs(job, follow=False)) == b"one\n"
    cancel(job)
    assert b"".join(logs(place.record(), follow=False)) == b""


@pytest.mark.slow
def test_any_bytes_and_many_of_them(place):
    """Pieces are of a few MB; a character may be cut in two, and a last line may have no end."""
    job = place.submit("head -c 9000000 /dev/urandom; printf 'é\\0 the end'; printf '\\n\\n'")
    text = read(job)
    assert text == (there(job) / "log").read_bytes()
    assert len(text) > 9_000_000
    assert text.endswith("é\0 the end\n\n".encode())


def test_a_job_that_fails_or_is_cancelled_ends_the_log(place):
    assert read(place.submit("echo last; exit 3")) == b"last\n"
    job = place.submit("echo first; srun sleep 60")
    pieces = logs(job, follow=True)
    while next(pieces) != b"first\n":
        pass
    place.cluster.run("scancel", str(number(job)), check=True)
    began = time.monotonic()
    assert b"CANCELLED" in b"".join(pieces)
    assert time.monotonic() - began < 20


def test_a_log_that_was_emptied_starts_again(login):
    job = login.submit('seq 1000; sleep 2; : >"$job/log"; echo new; sleep 2')
    assert read(job).endswith(b"\n1000\nnew\n")


def test_a_line_that_breaks_loses_nothing_and_repeats_nothing(remote, sshd):
    job = remote.submit("for i in {1..600}; do echo line $i; sleep 0.015; done")
    text, cuts = b"", 0
    for piece in logs(job, follow=True):
        text += piece
        if cuts < 3 and text.count(b"\n") > 100 * (cuts + 1):
            cuts += 1
            assert sshd.drop_connections()
    assert cuts == 3
    assert text.decode().splitlines() == [f"line {number}" for number in range(1, 601)]


@pytest.mark.slow
def test_a_line_that_breaks_at_any_time(remote, sshd):
    job = remote.submit("for i in {1..80000}; do echo line $i of many; done; sleep 2")
    stop = threading.Event()

    def cut() -> None:
        for _ in range(6):
            stop.wait(0.7)
            sshd.drop_connections()

    pieces = logs(job, follow=True)
    next(pieces)
    thread = threading.Thread(target=cut)
    thread.start()
    text = b"".join(pieces)
    stop.set()
    thread.join()
    assert text.decode().splitlines() == [f"line {number} of many" for number in range(1, 80001)]


def test_a_server_that_is_away_for_a_while(remote, sshd):
    job = remote.submit("for i in {1..20}; do echo line $i; sleep 0.2; done")
    pieces = logs(job, follow=True)
    text = b""
    while b"line 3\n" not in text:
        text += next(pieces)
    sshd.drop_connections()
    sshd.deafen()
    try:
        away = time.monotonic()
        while time.monotonic() - away < 5:
            text += next(pieces)
        with pytest.raises(ExecutorError, match="cannot be reached"):
            next(logs(job, follow=True))
    finally:
        sshd.listen()
    text += b"".join(pieces)
    assert text.decode().splitlines() == [f"line {number}" for number in range(1, 21)]


def test_cancelling(place):
    running, held = place.submit("srun sleep 60"), place.submit("true", "--hold")
    unknown = place.submit("true", "--hold")
    del unknown.status.handle["slurm_job_id"]
    while look([running])[0].state != "running":
        time.sleep(0.1)
    for job in (running, held, unknown):
        secret = there(job).parent.parent / "secrets" / job.id
        secret.parent.mkdir(exist_ok=True)
        secret.write_text("export A=b\n")
        cancel(job)
        assert look([job])[0].state == "cancelled"
        assert not secret.exists()
    cancel(running)
    assert look([running])[0].state == "cancelled"


def test_cancelling_leaves_other_jobs_and_ended_ones_alone(place):
    other, mine, done = place.submit("sleep 60", "--hold"), place.record(), place.submit("true")
    read(done)
    mine.status.handle["slurm_job_id"] = str(number(other))
    cancel(mine)
    cancel(done)
    assert look([other, done]) == [look([other])[0], look([done])[0]]
    assert look([other])[0].state == "pending"
    assert look([done])[0].state == "succeeded"
    cancel(other)


def test_cancelling_what_another_shell_is_submitting(login, monkeypatch):
    """It is waited for, and its secrets stay as long as it may still start."""
    job = login.record()
    job.status.reason = SUBMITTING
    secret = there(job).parent.parent / "secrets" / job.id
    for directory in (there(job), secret.parent):
        directory.mkdir(parents=True)
    secret.write_text("export A=b\n")
    with monkeypatch.context() as patched, pytest.raises(ExecutorError, match="is being submitted"):
        patched.setattr(follow, "_CANCEL_SECONDS", 0.5)
        cancel(job)
    assert secret.exists()
    threading.Timer(1.0, login.cluster.submit, ["true", f"--job-name={job.id}", "--hold"]).start()
    cancel(job)
    assert look([job])[0].state == "cancelled"
    assert not secret.exists()


def test_fetching(place):
    job = place.submit(
        'echo output; echo "{}" >"$job/summary.json"; head -c 5000000 /dev/urandom >"$job/metrics.jsonl"'
    )
    read(job)
    secret = there(job).parent.parent / "secrets" / job.id
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("export A=b\n")
    for _ in range(2):
        fetch(job)
        for name in ("log", "summary.json", "metrics.jsonl"):
            assert (job.directory / name).read_bytes() == (there(job) / name).read_bytes()
        assert sorted(path.name for path in job.directory.iterdir()) == ["log", "metrics.jsonl", "summary.json"]
        assert not secret.exists()


def test_cancelling_where_nobody_answered_a_moment_ago(login, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ExecutorError, match="cannot be cancelled: Slurm is silent"):
        cancel(replace(login.record(), note="not reachable: Slurm is silent"))


def test_a_lost_job_keeps_its_secrets_unless_it_ran(login):
    """Nobody knows of it; that is no proof that it will not start."""
    job = login.record()
    secret = there(job).parent.parent / "secrets" / job.id
    for directory in (there(job), secret.parent):
        directory.mkdir(parents=True)
    secret.write_text("export A=b\n")
    job.status = replace(job.status, state=LOST)
    fetch(job)
    assert secret.exists()
    job.status.started_at = "2026-01-01T00:00:00+00:00"
    fetch(job)
    assert not secret.exists()


def test_a_job_without_secrets_is_fetched_without_a_shell(login, monkeypatch):
    job = login.submit("echo output")
    read(job)
    monkeypatch.setattr("subprocess.Popen", None)
    fetch(replace(job, asked={**job.asked, "environment": {"A": "b"}}))
    assert (job.directory / "log").read_text() == "output\n"


def test_fetching_where_the_directory_is_the_same(login, tmp_path):
    job = login.submit("echo output")
    read(job)
    job.directory.rmdir()
    job.directory.symlink_to(there(job))
    before = {path.name: path.stat().st_mtime_ns for path in there(job).iterdir()}
    fetch(job)
    assert {path.name: path.stat().st_mtime_ns for path in there(job).iterdir()} == before
