"""The log of a job in a Lepton workspace: as it grows, over connections that break, and after its end."""

from __future__ import annotations

import json
import threading
import time
from statistics import median

import pytest
from support.lepton_following import Reader, running, say, waiting
from support.lepton_site import Site, until

from steps.dispatch.executors.lepton import EXECUTOR
from steps.errors import ExecutorError


def test_lines_come_while_the_job_runs_within_two_seconds(site: Site):
    stamp = "import time\nfor n in range(6): print(time.monotonic(), flush=True); time.sleep(0.3)"
    reader = Reader(site.submit(stamp))
    reader.end()
    lines = [(at, float(line)) for at, piece in reader.pieces for line in piece.split()]
    assert len(lines) == 6
    assert median(at - written for at, written in lines) < 2


def test_a_log_that_breaks_off_goes_on_where_it_was(site: Site):
    """Cut three times in the middle of characters and lines; every byte once."""
    text = "".join(f"{number} żółć\n" for number in range(2000))
    write = f"import sys\nsys.stdout.write({text!r}); sys.stdout.flush()"
    job, go = waiting(site, write, say("end"))
    reader = Reader(job)
    for _ in range(3):
        until(lambda: len(reader.text) >= len(text))
        until(lambda: site.lepton.streams)
        assert site.lepton.drop_logs() == 1
        until(lambda: not site.lepton.streams)
    go.touch()
    assert reader.end() == text + "end\n"


def test_a_server_that_is_away_for_a_while(site: Site):
    job, go = waiting(site, say("one"), say("two"))
    reader = Reader(job)
    until(lambda: reader.text == "one\n")
    site.lepton.down()
    go.touch()
    time.sleep(2)
    site.lepton.up()
    assert reader.end() == "one\ntwo\n"


def test_a_server_that_stays_away_is_told(site: Site, monkeypatch):
    monkeypatch.setattr("steps.dispatch.executors.lepton.logs._LOST_SECONDS", 1.0)
    job, _ = waiting(site, say("one"))
    reader = Reader(job)
    until(lambda: reader.text == "one\n")
    site.lepton.down()
    with pytest.raises(ExecutorError, match="Lepton workspace ws cannot be reached: connection refused"):
        reader.end()


def test_a_connection_that_is_silent_is_noticed_when_the_job_has_ended(site: Site, monkeypatch):
    """As behind a firewall that forgets: no end of the stream ever comes."""
    monkeypatch.setattr("steps.dispatch.executors.lepton.logs._CHECK_SECONDS", 0.5)
    from steps.dispatch.executors.lepton.client import Workspace

    real, silent = Workspace.log, threading.Event()

    def log(self, name, replica, idle_seconds):
        for piece in real(self, name, replica, idle_seconds):
            yield piece
            if not silent.is_set():
                silent.set()
                threading.Event().wait()

    monkeypatch.setattr(Workspace, "log", log)
    job, go = waiting(site, say("one"), say("two"))
    reader = Reader(job)
    until(lambda: reader.text == "one\n")
    go.touch()
    assert reader.end() == "one\ntwo\n"


def test_the_log_of_a_finished_job_ends(site: Site):
    job = site.submit(say("all of it"))
    until(lambda: site.remote(job).state == "Completed")
    assert b"".join(EXECUTOR.logs(job, follow=False)) == b"all of it\n"
    assert Reader(job).end() == "all of it\n"
    ended = site.ended(job)
    site.lepton.down()  # from now on it is read here
    assert b"".join(EXECUTOR.logs(ended, follow=False)) == b"all of it\n"


def test_the_log_of_a_running_job_is_what_there_is_now(site: Site):
    job, _ = waiting(site, say("one"))
    running(site, job)
    started = time.monotonic()
    assert b"".join(EXECUTOR.logs(job, follow=False)) == b"one\n"
    assert time.monotonic() - started < 30, "it followed"


def test_of_a_job_that_never_stops_writing_too(site: Site, monkeypatch):
    monkeypatch.setattr("steps.dispatch.executors.lepton.logs._SETTLED_SECONDS", 1.0)
    job = site.submit("import time\nwhile True: print('x', flush=True); time.sleep(0.01)")
    running(site, job, "x\n")
    assert set(b"".join(EXECUTOR.logs(job, follow=False)).split()) == {b"x"}


def test_a_queued_job_has_no_log_yet(site: Site):
    site.lepton.slow_start(1.5)
    job = site.submit(say("one"))
    assert list(EXECUTOR.logs(job, follow=False)) == []
    assert Reader(job).end() == "one\n"


def test_a_large_log_is_stored_whole(site: Site):
    job = site.ended(site.submit("for n in range(300_000): print(f'{n:06} of many lines')"))
    lines = (job.directory / "log").read_text().splitlines()
    assert lines == [f"{n:06} of many lines" for n in range(300_000)]


def test_a_last_line_without_an_end_and_metrics_arrive(site: Site):
    program = (
        "import pathlib, sys; job = pathlib.Path(sys.argv[2]).parent\n"
        "(job / 'metrics.jsonl').write_text('{\"loss\": 2.5}\\n{\"loss\": 1.5}\\n')\n"
        "(job / 'summary.json').write_text('{\"rows\": 3}'); print('no end', end='')"
    )
    job = site.ended(site.submit(program))
    assert (job.directory / "log").read_bytes() == b"no end"
    assert (job.directory / "metrics.jsonl").read_text() == '{"loss": 2.5}\n{"loss": 1.5}\n'
    assert json.loads((job.directory / "summary.json").read_text()) == {"rows": 3}
