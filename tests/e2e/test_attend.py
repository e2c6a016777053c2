"""Staying with a job that runs elsewhere: on a small cluster that is a directory (support/executors/cluster.py), whose
jobs are real processes and which can make them wait and be out of reach."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from support.executors import cluster

from steps.dispatch import processes

STEPS = [sys.executable, cluster.__file__]
CHAT = ["run", "data_prep/demo_chat", "-c", "tiny", "max_conversations=3", "-r", "cluster"]


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def before(*commands: str) -> str:
    return f"run.env.startup_commands={json.dumps(list(commands))}"


def signals_as_in_a_terminal() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Site:
    """A directory with a profile `cluster`, and that cluster."""

    def __init__(self, cwd: Path) -> None:
        self.cwd, self.room = cwd, cwd / "room"
        self.room.mkdir()
        (cwd / "env.toml").write_text('[cluster]\nexecutor = "cluster"\n[other]\nextends = "cluster"\nroom = "other"\n')
        self.env = {**os.environ, "ASKED": str(cwd / "asked")}
        self.env["PYTHONPATH"] = str(Path(cluster.__file__).parents[2])

    def start(self, *arguments: str, **more) -> subprocess.Popen:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(
            [*STEPS, *arguments], cwd=self.cwd, env=self.env, preexec_fn=signals_as_in_a_terminal, **pipes
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments) as child:
            out, err = child.communicate(timeout=90)
        return subprocess.CompletedProcess(arguments, child.returncode, out.decode(), err.decode())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.cwd.glob(".steps/jobs/*"))

    def status(self, name: str) -> dict:
        return json.loads((self.cwd / ".steps/jobs" / name / "status.json").read_text())

    def running(self) -> tuple[str, int]:
        """The job, once it runs on the cluster, and its process there."""
        name = wait_for(self.names)[-1]
        wait_for(lambda: (self.room / name / "started").exists())
        return name, int((self.room / name / "pid").read_text())


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    for file in tmp_path.glob("*/*/pid"):
        pid = int(file.read_text())
        if processes.session_lives(pid, ""):
            os.killpg(pid, signal.SIGKILL)


def test_the_log_arrives_as_it_was_written(site):
    done = site(*CHAT, before("echo 'größer ✓ 你好'", "printf 'half a '", "sleep 1", "echo line"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("größer ✓ 你好\nhalf a line\nraw_jsonl written to output/tiny/chat\n")
    assert "data_prep/demo_chat done in" in done.stdout
    (name,) = site.names()
    assert site.status(name)["state"] == "succeeded"
    assert (site.cwd / ".steps/jobs" / name / "log").read_text().startswith("größer ✓ 你好\n")  # fetched


def test_each_line_is_here_within_two_seconds(site):
    child = site.start(*CHAT, before("for i in 1 2 3 4 5 6; do date +%s.%N; sleep 0.7; done"))
    late = [time.time() - float(child.stdout.readline()) for _ in range(6)]
    child.communicate(timeout=60)
    assert median(late) < 2.0, late


def test_the_exit_code_is_the_jobs_own(site):
    done = site(*CHAT, before("echo first", "exit 3"))
    assert done.returncode == 3
    assert done.stdout == "first\n"
    assert "data_prep/demo_chat failed: exit code 3. Log: .steps/jobs/" in done.stderr


def test_why_it_waits_is_told_when_that_changes(site):
    (site.room / "hold").write_text("Priority")
    child = site.start(*CHAT)
    lines = iter(child.stderr.readline, b"")
    assert re.fullmatch(rb"job [0-9a-f]{6} submitted \(Cluster c\d+\)\. Ctrl-C cancels it\.\n", next(lines))
    assert re.fullmatch(rb"job \S+ is pending: Priority\n", next(lines))
    (site.room / "hold").write_text("Resources")
    assert re.fullmatch(rb"job \S+ is pending: Resources\n", next(lines))
    (site.room / "hold").unlink()
    _, rest = child.communicate(timeout=60)
    assert child.returncode == 0
    assert rest.count(b"\n") <= 1  # "is running", if it was seen running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_without_a_terminal_ctrl_c_cancels(site, number):
    child = site.start(*CHAT, before("echo begun", "sleep 60"))
    assert child.stdout.readline() == b"begun\n"
    name, pid = site.running()
    child.send_signal(number)
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert not processes.session_lives(pid, "")
    assert site.status(name)["state"] == "cancelled"
    assert f"cancelling job {name}" in told.decode()
    assert "was cancelled: cancelled on the cluster" in told.decode()
    assert "Traceback" not in told.decode()


def test_ctrl_c_while_it_waits_cancels_too(site):
    (site.room / "hold").write_text("Priority")
    child = site.start(*CHAT)
    assert b"submitted" in child.stderr.readline()
    assert b"Priority" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode == 130
    assert site.status(site.names()[0])["state"] == "cancelled"


class Terminal:
    """`steps` on a terminal of its own, where keys can be pressed."""

    def __init__(self, site: Site, *arguments: str, stdout: str = "") -> None:
        pid, self.screen = pty.fork()
        if pid == 0:
            os.chdir(site.cwd)
            if stdout:
                os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
            signals_as_in_a_terminal()
            os.execve(sys.executable, [*STEPS, *arguments], site.env)
        self.pid, self.seen = pid, b""

    def until(self, text: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while text.encode() not in self.seen:
            assert time.monotonic() < end, self.seen.decode()
            self._read()

    def _read(self) -> bool:
        if select.select([self.screen], [], [], 0.2)[0]:
            try:
                block = os.read(self.screen, 65536)
            except OSError:  # the other end is closed
                return False
            self.seen += block
            return bool(block)
        return True

    def press(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def end(self) -> int:
        while self._read():
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.screen)
        return code


@pytest.mark.parametrize("answer", [b"y\n", b"\n", b"\x03"])
def test_on_a_terminal_ctrl_c_asks_and_yes_cancels(site, answer):
    terminal = Terminal(site, *CHAT, before("echo begun", "sleep 60"))
    terminal.until("begun")
    name, pid = site.running()
    terminal.press(b"\x03")
    terminal.until(f"cancel job {name}? [Y/n]")
    terminal.press(answer)
    assert terminal.end() == 130, terminal.seen.decode()
    assert not processes.session_lives(pid, "")
    assert site.status(name)["state"] == "cancelled"


def test_on_a_terminal_no_leaves_the_job_to_itself(site):
    terminal = Terminal(site, *CHAT, before("echo begun", "sleep 4"))
    terminal.until("begun")
    name, pid = site.running()
    terminal.press(b"\x03")
    terminal.until("[Y/n]")
    terminal.press(b"n\n")
    assert terminal.end() == 130
    for command in ("status", "logs -f", "cancel"):
        assert f"steps jobs {command} {name[-6:]}" in terminal.seen.decode()
    assert "failed" not in terminal.seen.decode()
    assert processes.session_lives(pid, "")
    done = site("jobs", "logs", "-f", name)
    assert done.returncode == 0
    assert "raw_jsonl written" in done.stdout
    assert site.status(name)["state"] == "succeeded"


def test_ctrl_c_asks_too_where_the_output_goes_to_a_file(site):
    terminal = Terminal(site, *CHAT, before("echo begun", "sleep 60"), stdout="saved.txt")
    terminal.until("Ctrl-C asks whether to cancel it.")
    name, pid = site.running()
    wait_for(lambda: "begun" in (site.cwd / "saved.txt").read_text())
    terminal.press(b"\x03")
    terminal.until(f"cancel job {name}? [Y/n]")
    assert processes.session_lives(pid, "")
    terminal.press(b"y\n")
    assert terminal.end() == 130
    assert site.status(name)["state"] == "cancelled"
    assert "submitted" not in (site.cwd / "saved.txt").read_text()


def test_whoever_leaves_a_log_is_told_that_the_job_goes_on(site):
    name = submit(site, before("echo begun", "sleep 60"))
    child = site.start("jobs", "logs", "-f", name)
    assert child.stdout.readline() == b"begun\n"
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert f"job {name[-6:]} goes on (steps jobs cancel {name[-6:]} ends it)\n" == told.decode()
    assert site("jobs", "cancel", name).returncode == 0


def test_a_terminal_that_is_closed_cancels_the_job(site):
    terminal = Terminal(site, *CHAT, before("echo begun", "sleep 60"))
    terminal.until("begun")
    name, pid = site.running()
    os.close(terminal.screen)
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 130
    assert not processes.session_lives(pid, "")
    assert site.status(name)["state"] == "cancelled"


def test_a_broken_connection_is_told_once_and_survived(site):
    child = site.start(*CHAT, before("for i in 1 2 3 4 5 6; do echo line $i; sleep 0.8; done"))
    assert child.stdout.readline() == b"line 1\n"
    assert b"submitted" in child.stderr.readline()
    (site.room / "down").touch()
    assert b"no connection to job" in child.stderr.readline()
    time.sleep(2)
    (site.room / "down").unlink()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert [line for line in out.decode().splitlines() if line.startswith("line")] == [f"line {n}" for n in range(2, 7)]
    assert err.decode().count("no connection") == 0
    assert err.decode().count("again") == 1


def test_ctrl_c_while_the_connection_is_broken_cancels_when_it_is_back(site):
    child = site.start(*CHAT, before("echo begun", "sleep 60"))
    child.stdout.readline()
    name, pid = site.running()
    (site.room / "down").touch()
    child.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert child.poll() is None
    (site.room / "down").unlink()
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"cannot be cancelled (connection refused); trying again" in told
    assert not processes.session_lives(pid, "")
    assert site.status(name)["state"] == "cancelled"


def test_whoever_has_enough_of_waiting_may_leave(site):
    child = site.start(*CHAT, before("echo begun", "sleep 60"))
    child.stdout.readline()
    name, _ = site.running()
    (site.room / "down").touch()
    child.send_signal(signal.SIGINT)
    time.sleep(1.5)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=20)
    assert child.returncode == 130
    assert f"job {name} may still run" in told.decode()
    (site.room / "down").unlink()


def test_a_job_that_vanishes_is_lost_and_no_success(site):
    child = site.start(*CHAT, before("echo begun", "sleep 60"))
    child.stdout.readline()
    _, pid = site.running()
    os.killpg(pid, signal.SIGKILL)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 5
    assert "data_prep/demo_chat is lost: it is gone without a word" in told.decode()


def test_a_job_cancelled_by_somebody_else_is_told(site):
    child = site.start(*CHAT, before("echo begun", "sleep 60"))
    child.stdout.readline()
    name, _ = site.running()
    done = site("jobs", "cancel", name)
    assert (done.returncode, done.stdout) == (0, f"job {name} is cancelled\n")
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "data_prep/demo_chat was cancelled: cancelled on the cluster" in told.decode()


@pytest.mark.parametrize("where", ["| head -1", ">/dev/full", ">&-"])
def test_a_screen_that_cannot_be_written_never_ends_the_job(site, where):
    command = f"{sys.executable} {cluster.__file__} {' '.join(CHAT)} '{before('seq 1000')}' {where}"
    subprocess.run(["bash", "-c", command], cwd=site.cwd, env=site.env, stderr=subprocess.DEVNULL, timeout=60)
    assert site.status(site.names()[0])["state"] == "succeeded"


def submit(site: Site, *more: str) -> str:
    arguments = ["cluster" if word == "cluster" else word for word in CHAT]
    arguments[arguments.index("-r")] = "-b"
    done = site(*arguments, *more)
    assert done.returncode == 0, done.stderr
    return re.match(r"job (\S+) is", done.stdout)[1]


def test_the_cluster_is_asked_once_for_all_and_its_end_is_written_down(site):
    names = [submit(site, f"output_dir=out{number}") for number in range(3)]
    wait_for(lambda: all((site.room / name / "exit_code").exists() for name in names))
    (site.cwd / "asked").unlink(missing_ok=True)
    assert [job["state"] for job in json.loads(site("jobs", "list", "--json").stdout)] == ["succeeded"] * 3
    assert (site.cwd / "asked").read_text().splitlines() == [" ".join(names)]
    assert "raw_jsonl" in (site.cwd / ".steps/jobs" / names[0] / "log").read_text()
    site("jobs", "list")  # they have ended: nobody is asked any more
    assert len((site.cwd / "asked").read_text().splitlines()) == 1


def test_a_cluster_out_of_reach_does_not_hide_the_others(site):
    (site.room / "hold").write_text("Priority")
    waiting = submit(site)
    other = submit(site, "run.env.room=other", "output_dir=out")
    here = site("run", "data_prep/demo_chat", "-c", "tiny", "-b", "local", "output_dir=here").stdout.split()[1]
    wait_for(lambda: (site.cwd / "other" / other / "exit_code").exists())
    site("jobs", "list")
    (site.room / "down").touch()
    jobs = {job["id"]: job for job in json.loads(site("jobs", "list", "--json").stdout)}
    assert jobs[waiting]["state"] == "pending"
    assert jobs[waiting]["note"] == "not reachable: connection refused"
    assert jobs[other]["state"] == "succeeded"
    wait_for(lambda: site.status(here)["state"] == "succeeded")
    done = site("jobs", "status", waiting)
    assert done.returncode == 5
    told = r"pending: Priority, as of \d\d:\d\d:\d\d \(not reachable: connection refused\)"
    assert re.search(told, done.stdout)
    assert (done.stdout + done.stderr).count("not reachable") == 1
    assert f"Next\n  steps jobs status {waiting[-6:]}\n" in done.stdout  # nothing else would work now
    assert site("jobs", "cancel", waiting).returncode == 5
    (site.room / "down").unlink()
    assert site("jobs", "cancel", waiting).stdout == f"job {waiting} is cancelled\n"


def test_a_cluster_out_of_reach_is_asked_once_for_all_profiles(site):
    (site.room / "hold").write_text("Priority")
    names = [submit(site), submit(site, "output_dir=out")]
    path = site.cwd / ".steps/jobs" / names[1] / "job.yaml"
    path.write_text(path.read_text().replace("profile: cluster", "profile: other"))
    (site.room / "down").touch()
    (site.cwd / "asked").unlink(missing_ok=True)
    assert site("jobs", "list").stdout.count("not reachable: connection refused") == 2
    assert (site.cwd / "asked").read_text().splitlines() == [" ".join(names)]
    (site.room / "down").unlink()
    assert site("jobs", "cancel", *names).returncode == 0


def test_what_could_not_be_fetched_is_fetched_later(site):
    name = submit(site, before("sleep 1"))
    wait_for(lambda: (site.room / name / "exit_code").exists())
    log = site.room / name / "log"
    log.rename(site.room / "aside")
    log.mkdir()  # cannot be copied
    (job,) = json.loads(site("jobs", "list", "--json").stdout)
    assert job["state"] == "succeeded"
    assert job["note"]
    log.rmdir()
    (site.room / "aside").rename(log)
    (job,) = json.loads(site("jobs", "list", "--json").stdout)
    assert job["note"] == ""
    assert "raw_jsonl" in (site.cwd / ".steps/jobs" / name / "log").read_text()


def test_a_submission_killed_on_the_way_is_lost_only_after_a_while(site):
    child = site.start(*CHAT, "run.env.fragile=true")
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    (name,) = site.names()
    (job,) = json.loads(site("jobs", "list", "--json").stdout)
    assert (job["state"], job["reason"]) == ("pending", "being submitted")
    path = site.cwd / ".steps/jobs" / name / "job.yaml"
    path.write_text(re.sub("submitted_at: .*", "submitted_at: '2026-01-01T00:00:00+00:00'", path.read_text()))
    (job,) = json.loads(site("jobs", "list", "--json").stdout)
    assert (job["state"], job["reason"]) == ("lost", "the cluster does not know it")


def test_a_cluster_out_of_reach_at_submission_is_an_error_with_its_code(site):
    (site.room / "down").touch()
    done = site(*CHAT)
    assert done.returncode == 5
    assert done.stderr == "error: connection refused\n"


def test_an_executor_that_is_gone_is_a_note(site):
    (site.room / "hold").write_text("Priority")
    name = submit(site)
    done = subprocess.run(
        [sys.executable, "-m", "steps", "jobs", "list", "--json"], cwd=site.cwd, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["id"] == name
    assert "there is no executor 'cluster'" in json.loads(done.stdout)[0]["note"]
