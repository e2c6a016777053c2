"""A job in a Lepton workspace after its submission: its log, its end, cancelling it, several workers."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.lepton_jobs import Replica, names_resolve
from support.lepton_site import DEMO, Site, until

from steps.dispatch.executors.lepton import EXECUTOR
from steps.dispatch.job import JobRecord
from steps.errors import ExecutorError

WAIT = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.02)\n"
needs_names = pytest.mark.skipif(not names_resolve(), reason="this machine allows no mount namespace")


class Reader:
    """Reads a job's log in a thread of its own, and notes when each piece came."""

    def __init__(self, job: JobRecord) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._read, args=(EXECUTOR.logs(job, follow=True),), daemon=True)
        self.thread.start()

    def _read(self, pieces: Iterator[bytes]) -> None:
        try:
            for piece in pieces:
                self.pieces.append((time.monotonic(), piece))
        except ExecutorError as error:
            self.error = error

    @property
    def text(self) -> str:
        return b"".join(piece for _, piece in self.pieces).decode()

    def end(self) -> str:
        self.thread.join(30)
        assert not self.thread.is_alive(), "the log does not end"
        if self.error:
            raise self.error
        gaps = [later - earlier for (earlier, _), (later, _) in zip(self.pieces, self.pieces[1:], strict=False)]
        assert max(gaps, default=0) < 1.5  # a busy machine; an empty piece comes twice a second
        return self.text


def waiting(site: Site, before: str = "", after: str = "", **given: Any) -> tuple[JobRecord, Path]:
    """A job that writes, waits until the file `go` is there, and writes again."""
    go = site.directory / "go"
    return site.submit(f"{before}\n{WAIT.format(str(go))}\n{after}", **given), go


def say(text: str) -> str:
    return f"print({text!r}, flush=True)"


def running(site: Site, job: JobRecord, text: str = "one\n") -> None:
    until(lambda: text in b"".join(EXECUTOR.logs(job, follow=False)).decode())


# logs


def test_lines_come_while_the_job_runs_within_two_seconds(site: Site):
    stamp = "import time\nfor n in range(6): print(time.monotonic(), flush=True); time.sleep(0.3)"
    reader = Reader(site.submit(stamp))
    reader.end()
    lines = [(at, float(line)) for at, piece in reader.pieces for line in piece.split()]
    assert len(lines) == 6
    assert max(at - written for at, written in lines) < 2


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
    assert time.monotonic() - started < 3


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


# states


def test_states_on_the_way(site: Site):
    site.lepton.slow_start(1.5)
    job, go = waiting(site, say("one"))
    (status,) = EXECUTOR.look([job])
    assert (status.state, status.reason, status.handle) == ("pending", "Queueing", job.status.handle)
    running(site, job)
    (status,) = EXECUTOR.look([job])
    assert (status.state, status.reason, status.exit_code) == ("running", "", None)
    assert status.started_at
    go.touch()
    ended = site.ended(job)
    assert (ended.status.state, ended.status.exit_code) == ("succeeded", 0)


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("raise SystemExit(3)", 3, "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "exit code 137"),
        (
            "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
            None,
            "Failed: it was killed (out of memory?), or ",
        ),
    ],
)
def test_how_a_job_failed(site: Site, program: str, code: int | None, reason: str):
    status = site.ended(site.submit(program)).status
    assert (status.state, status.exit_code) == ("failed", code)
    assert status.reason.startswith(reason)
    assert status.ended_at


@pytest.mark.parametrize(("program", "state"), [("", "succeeded"), ("raise SystemExit(3)", "failed")])
@pytest.mark.parametrize("word", ["Archived", "Deleted"])
def test_a_job_that_was_deleted_after_its_end(site: Site, program: str, state: str, word: str):
    """The log is gone with it; counts are left. What was known before stays."""
    site.lepton.archived_state = word
    job = site.submit(program)
    until(lambda: site.remote(job).state in ("Completed", "Failed"))
    (before,) = EXECUTOR.look([job])
    site.remote(job).end("Deleted")
    (status,) = EXECUTOR.look([job])
    assert status.state == before.state == state
    if state == "failed":
        assert status.reason == f"1 of 1 workers had failed, then it was deleted ({word})"
    known = replace(job, status=before)
    assert EXECUTOR.look([known]) == [before]
    assert site.ended(job).status.state == state  # fetching what is left is no failure


def test_a_job_that_lepton_does_not_know(site: Site):
    job = site.submit("")
    until(lambda: site.remote(job).state == "Completed")
    site.lepton.jobs.clear()
    (status,) = EXECUTOR.look([job])
    assert (status.state, status.reason) == ("lost", "Lepton does not know it any more")


def test_many_jobs_are_asked_for_at_once(site: Site):
    found = [site.submit(f"raise SystemExit({number})") for number in range(5)]
    until(lambda: all(site.remote(job).completed for job in found))
    del site.lepton.requests[:]
    assert [status.exit_code for status in EXECUTOR.look(found)] == [0, 1, 2, 3, 4]
    pages = [path for _, path, _ in site.lepton.requests if path.startswith("/jobs?")]
    assert [re.search(r"page=(\d+)", page)[1] for page in pages] == ["1", "2"]


def test_looking_fails_as_an_executor(site: Site):
    job = site.submit("")
    site.lepton.token = "another"
    with pytest.raises(ExecutorError, match="refuses the token"):
        EXECUTOR.look([job])
    site.lepton.token = "good-token"
    site.lepton.fail_next("/jobs", 500)
    with pytest.raises(ExecutorError, match="failed with status 500. Try again"):
        EXECUTOR.look([job])
    site.lepton.down()
    with pytest.raises(ExecutorError, match="cannot be reached: connection refused"):
        EXECUTOR.look([job])


def test_a_server_that_says_nothing(site: Site, monkeypatch):
    monkeypatch.setattr("steps.dispatch.executors.lepton.client._ANSWER_SECONDS", 0.5)
    job = site.submit("")
    site.lepton.down(hang=True)
    with pytest.raises(ExecutorError, match="cannot be reached: no answer in time"):
        EXECUTOR.look([job])


# cancelling


def test_a_running_job_is_cancelled_and_its_step_can_end_well(site: Site):
    stop = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(130)))"
    job, _ = waiting(site, f"{stop}\n{say('one')}", secret_env={"HF_TOKEN": "hf_s3cret_value"})
    running(site, job)
    EXECUTOR.cancel(job)
    ended = site.ended(job)
    assert (ended.status.state, ended.status.reason) == ("cancelled", "stopped")
    assert (ended.directory / "log").read_text() == "one\nsaved\n"
    assert site.lepton.processes() == []
    assert site.lepton.secrets == {}
    EXECUTOR.cancel(ended)  # is left alone


def test_a_waiting_job_is_cancelled(site: Site):
    site.lepton.slow_start(1.5)
    job = site.submit(say("never"), secret_env={"HF_TOKEN": "hf_s3cret_value"})
    assert EXECUTOR.look([job])[0].state == "pending"
    EXECUTOR.cancel(job)
    assert site.ended(job).status.state == "cancelled"
    assert site.remote(job).replicas[0].process is None
    assert site.lepton.secrets == {}


def test_a_job_that_ended_meanwhile_keeps_its_end(site: Site):
    job = site.submit("")
    until(lambda: site.remote(job).state == "Completed")
    EXECUTOR.cancel(job)
    assert site.ended(job).status.state == "succeeded"


def test_cancelled_through_the_command_line(site: Site):
    site.profile(startup_commands=["echo waiting", "exec sleep 60"])
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 0, done.stderr
    done = site.steps("jobs", "cancel", "latest")
    assert done.returncode == 0, done.stderr
    assert "cancelled" in site.steps("jobs", "list").stdout
    assert site.lepton.processes() == []


def test_ctrl_c_cancels_an_attached_job(site: Site):
    site.profile(startup_commands=["echo waiting", "exec sleep 60"])
    process = site.start("run", *DEMO, "-r", "here")
    until(lambda: [job for job in site.lepton.jobs if job.replicas[0].process and not job.id.startswith("move-")])
    until(lambda: "waiting" in "".join(job.replicas[0].log.read_text() for job in site.lepton.jobs))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert site.record().status.state == "cancelled"
    assert site.lepton.processes() == []


# several workers

REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", value.item(), flush=True)
dist.destroy_process_group()
"""


@needs_names
def test_two_workers_with_two_processes_meet(site: Site):
    job = site.ended(site.submit(REDUCE, nodes=2, nprocs=2, torchrun=True, env={"OMP_NUM_THREADS": "1"}))
    log = (job.directory / "log").read_text()
    assert job.status.state == "succeeded", log
    assert sorted(re.findall(r"rank .*", log)) == ["rank 0 of 4 sum 10.0", "rank 1 of 4 sum 10.0"]  # of worker 0
    other = site.remote(job).replicas[1].log.read_text()
    assert sorted(re.findall(r"rank .*", other)) == ["rank 2 of 4 sum 10.0", "rank 3 of 4 sum 10.0"]


@needs_names
def test_a_second_worker_that_fails_gives_the_job_its_exit_code_and_its_last_lines(site: Site):
    program = f"{REDUCE.replace('dist.destroy', '#')}\nimport sys, time\n"
    program += "if dist.get_rank() == 1: print('this is why', flush=True); sys.exit(3)\ntime.sleep(60)\n"
    job = site.ended(site.submit(program, nodes=2, torchrun=True, env={"OMP_NUM_THREADS": "1"}))
    assert (job.status.state, job.status.exit_code) == ("failed", 3)
    assert job.status.reason == "exit code 3 of worker 1"
    log = (job.directory / "log").read_text()
    head, _, tail = log.partition("--- the last lines of worker 1, which failed first ---\n")
    assert "rank 0 of 2 sum 3.0" in head
    assert "this is why" in tail
    assert "[steps" not in log


@needs_names
def test_a_second_worker_that_is_killed(site: Site):
    """Its script could say nothing."""
    program = REDUCE.replace("dist.destroy", "#") + "\nimport time\ntime.sleep(60)\n"
    job = site.submit(program, nodes=2, torchrun=True, env={"OMP_NUM_THREADS": "1"})
    until(lambda: "rank 1" in site.remote(job).replicas[1].log.read_text())
    site.remote(job).replicas[1].process.kill()
    ended = site.ended(job)
    assert (ended.status.state, ended.status.exit_code) == ("failed", None)
    assert ended.status.reason.startswith("Failed: worker 1 was killed (out of memory?), or its node was lost")


@needs_names
def test_two_workers_are_cancelled(site: Site):
    program = REDUCE.replace("dist.destroy", "#") + "\nimport time\ntime.sleep(60)\n"
    job = site.submit(program, nodes=2, torchrun=True, env={"OMP_NUM_THREADS": "1"})
    running(site, job, "rank 0")
    EXECUTOR.cancel(job)
    assert site.ended(job).status.state == "cancelled"
    assert site.lepton.processes() == []
    assert "Traceback" not in (job.directory / "log").read_text()


def test_a_first_worker_that_ends_early_is_not_read_again_and_again(site: Site):
    go = site.directory / "go"
    program = f"import os\nif os.environ['LEPTON_JOB_WORKER_INDEX'] == '1':\n  {say('one')}\n  {WAIT.format(str(go))}"
    job = site.submit(program.replace("\nwhile", "\n  while"), nodes=2)
    reader = Reader(job)
    until(lambda: site.remote(job).replicas[0].rc == 0)
    time.sleep(2.5)
    go.touch()
    assert reader.end() == ""
    assert len([path for _, path, _ in site.lepton.requests if path.endswith("/log")]) == 1


def test_a_first_worker_that_is_started_again_is_followed(site: Site):
    """As after making room for another job: a new worker with a log of its own."""
    go = site.directory / "go"
    program = f"import os\nif os.environ['LEPTON_JOB_WORKER_INDEX'] == '1':\n  {WAIT.format(str(go))}\n{say('one')}"
    job = site.submit(program.replace("\nwhile", "\n  while"), nodes=2)
    reader, remote = Reader(job), site.remote(job)
    until(lambda: reader.text == "one\n" and remote.replicas[0].gone.is_set())
    again = Replica(remote.id, 0, remote.root)
    again.start(["bash", "-c", f"echo again; until [ -e {go} ]; do sleep 0.02; done"], remote.environment)
    remote.replicas[0] = again
    until(lambda: reader.text == "one\nagain\n")
    go.touch()
    assert reader.end() == "one\nagain\n"


def test_one_worker_with_two_processes(site: Site):
    job = site.ended(site.submit(REDUCE, nprocs=2, torchrun=True, env={"OMP_NUM_THREADS": "1"}))
    log = (job.directory / "log").read_text()
    assert sorted(re.findall(r"rank .*", log)) == ["rank 0 of 2 sum 3.0", "rank 1 of 2 sum 3.0"]
