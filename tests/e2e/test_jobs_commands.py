"""`steps jobs …` for jobs on this machine: real processes, several shells, and what happens when some are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.steps import steps

from steps.dispatch import complete, processes

CHAT = ["run", "data_prep/demo_chat", "-c", "tiny", "max_conversations=3"]
STEPS = [sys.executable, "-m", "steps"]


def wait_for(condition, seconds=40.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def before(*commands: str) -> str:
    """The override by which a job first runs these shell commands."""
    return f"run.env.startup_commands={json.dumps(list(commands))}"


@pytest.fixture
def shell(tmp_path):
    """`steps` in one directory; whatever still runs there at the end is cancelled."""
    yield Shell(tmp_path)
    for job in Shell(tmp_path).list():
        if job["state"] in ("pending", "running"):
            steps("jobs", "cancel", job["id"], cwd=tmp_path)


class Shell:
    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def __call__(self, *arguments: str, **more):
        return steps(*arguments, cwd=self.cwd, **more)

    def jobs(self, *arguments: str, **more):
        return self("jobs", *arguments, **more)

    def submit(self, *commands: str, more=(), env=None) -> str:
        done = self(*CHAT, before(*commands), "-b", "local", *more, env=env)
        assert done.returncode == 0, done.stderr
        return re.match(r"job (\S+) is pending", done.stdout)[1]

    def list(self, *arguments: str) -> list[dict]:
        done = self.jobs("list", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def status(self, name: str) -> dict:
        done = self.jobs("status", "--json", name)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def state(self, name: str) -> str:
        return self.status(name)["state"]

    def directory(self, name: str) -> Path:
        return self.cwd / ".steps" / "jobs" / name

    def written(self, name: str) -> dict:
        return json.loads((self.directory(name) / "status.json").read_text())

    def running(self, name: str) -> dict:
        """The handle of a job, once it runs."""
        return wait_for(lambda: self.written(name)["state"] == "running" and self.written(name))["handle"]


def test_a_submitted_job_has_a_status_at_once(shell):
    name = shell.submit("sleep 30")
    assert shell.written(name)["handle"]["supervisor"]


def test_a_job_is_known_in_any_later_shell(shell):
    name = shell.submit("echo begun", "sleep 1")
    shell.running(name)
    assert [(job["id"], job["state"]) for job in shell.list()] == [(name, "running")]
    done = shell.jobs("logs", "-f", name)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "begun"
    assert "raw_jsonl written to output/tiny/chat" in done.stdout
    assert done.stderr.splitlines()[-1] == f"job {name} succeeded"
    told = shell.jobs("status", name)
    assert told.returncode == 0
    assert f"{name}  succeeded" in told.stdout
    assert f"steps jobs logs {name[-6:]}" in told.stdout
    table = shell.jobs("list").stdout
    line = rf"^{name[-6:]}  \d\d-\d\d \d\d:\d\d +\d+s +succeeded  data_prep/demo_chat  local$"
    assert re.search(line, table, re.M), table


def test_a_failed_job_says_why_and_how_its_log_ends(shell):
    name = shell.submit("seq 100", "echo the very end", "exit 3")
    done = shell.jobs("logs", "-f", "latest")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, f"job {name} failed: exit code 3")
    known = shell.status(name)
    assert (known["state"], known["exit_code"], known["reason"]) == ("failed", 3, "exit code 3")
    assert known["log_tail"] == [*map(str, range(82, 101)), "the very end"]
    page = shell.jobs("status", name).stdout
    assert "the very end" in page
    assert f"steps jobs rerun {name[-6:]}" in page


def test_logs_can_begin_near_the_end(shell):
    name = shell.submit("seq 1000", "printf 'no line end'", "exit 1")
    wait_for(lambda: shell.written(name)["state"] == "failed")
    assert shell.jobs("logs", name, "-n", "2").stdout == "1000\nno line end"
    assert shell.jobs("logs", name, "-f", "-n", "3").stdout == "999\n1000\nno line end"
    assert shell.jobs("logs", name).stdout == "".join(f"{n}\n" for n in range(1, 1001)) + "no line end"
    assert shell.jobs("logs", name, "-n", "0").stdout == ""


def test_cancel_ends_the_job_and_everything_it_started(shell):
    name = shell.submit("sleep 97 & sleep 98")
    handle = shell.running(name)
    assert processes.session_lives(handle["pid"], handle["started"])
    done = shell.jobs("cancel", name[-6:])
    assert (done.returncode, done.stdout) == (0, f"job {name} is cancelled\n")
    assert not processes.session_lives(handle["pid"], handle["started"])
    assert not processes.lives(handle["supervisor"], handle["supervisor_started"])
    assert (shell.state(name), shell.status(name)["exit_code"]) == ("cancelled", 130)
    again = shell.jobs("cancel", name)
    assert (again.returncode, again.stdout) == (0, f"job {name} has already ended: cancelled: stopped by the user\n")


def test_a_wrong_name_among_several_cancels_none(shell):
    name = shell.submit("sleep 60")
    done = shell.jobs("cancel", name, "nowhere")
    assert done.returncode == 2
    assert "there is no job 'nowhere'" in done.stderr
    assert shell.state(name) in ("pending", "running")


def test_a_job_can_be_cancelled_before_it_is_awake(shell):
    names = [shell.submit("sleep 60") for _ in range(3)]
    assert shell.jobs("cancel", *names).returncode == 0
    assert [shell.state(name) for name in names] == ["cancelled"] * 3


def test_an_attached_job_can_be_cancelled_from_another_shell(shell):
    child = subprocess.Popen(
        [*STEPS, *CHAT, before("sleep 60")], cwd=shell.cwd, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    name = wait_for(lambda: [job["id"] for job in shell.list() if job["state"] == "running"])[0]
    assert shell.jobs("cancel", name).stdout == f"job {name} is cancelled\n"
    _, told = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "data_prep/demo_chat was cancelled: stopped by the user" in told


def test_a_job_waits_for_another_and_runs_when_that_has_succeeded(shell):
    first = shell.submit("sleep 2")
    second = shell.submit("true", more=["output_dir=second", "--after", first[-6:]])
    status = shell.written(second)
    assert (status["state"], status["reason"]) == ("pending", f"waits for data_prep-demo_chat-{first[-6:]}")
    wait_for(lambda: shell.state(second) == "succeeded")
    one, two = shell.status(first), shell.status(second)
    assert one["ended_at"] <= two["started_at"]
    assert two["after"] == [first]


def test_a_job_waits_for_one_of_the_directory_above_and_for_none_of_elsewhere(shell, tmp_path_factory):
    first = shell.submit("sleep 2")
    below = shell.cwd / "below"
    below.mkdir()
    done = steps(*CHAT, "--after", first, cwd=below)
    assert done.returncode == 0, done.stderr
    other = shell.submit("sleep 2")
    done = steps(*CHAT, "--after", str(shell.directory(other)), cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 2
    assert f"job {other} is of another place ({shell.directory(other).parent})" in done.stderr


def test_attached_jobs_wait_too_and_say_so(shell):
    first = shell.submit("sleep 1")
    done = shell(*CHAT, "output_dir=second", "--after", first)
    assert done.returncode == 0
    assert f"waits for data_prep-demo_chat-{first[-6:]}" in done.stderr


def test_what_waits_for_a_failure_is_cancelled_with_its_reason(shell):
    first = shell.submit("sleep 1", "exit 3")
    second = shell.submit("true", more=["--after", first])
    third = shell.submit("true", more=["--after", second])
    wait_for(lambda: shell.state(third) == "cancelled")
    assert shell.status(second)["reason"] == (
        f"data_prep-demo_chat-{first[-6:]}, for which it waited, is failed (exit code 3)"
    )
    assert f"{second[-6:]}, for which it waited, is cancelled" in shell.status(third)["reason"]
    assert not (shell.cwd / "output").exists()


def test_a_waiting_job_can_be_cancelled(shell):
    first = shell.submit("sleep 60")
    second = shell.submit("true", more=["--after", first])
    assert shell.jobs("cancel", second).stdout == f"job {second} is cancelled\n"
    assert shell.state(first) == "running"
    assert shell.jobs("cancel", first).returncode == 0


def test_a_whole_chain_can_be_submitted(shell):
    done = shell("run", "data_prep/sft_packing", "-c", "tiny", "--upstream", "-b", "local")
    assert done.returncode == 0, done.stderr
    chat, packing = re.findall(r"^\[\d/2\] ([0-9a-f]{6}) ", done.stdout, re.M)
    assert f"waits for {chat}" in done.stdout
    assert [job["id"][-6:] for job in shell.list()] == [chat, packing]  # the last one is the newest
    wait_for(lambda: shell.state("latest") == "succeeded", 90)
    assert (shell.cwd / "output/tiny/packed/artifact.json").exists()


def test_a_job_without_its_supervisor_is_lost_and_its_step_is_gone(shell):
    name = shell.submit("exec sleep 60")
    handle = shell.running(name)
    os.kill(handle["supervisor"], signal.SIGKILL)
    wait_for(lambda: not processes.session_lives(handle["pid"], handle["started"]), 20)
    known = shell.status(name)
    assert known["state"] == "lost"
    assert known["reason"] == f"its supervisor (process {handle['supervisor']}) is gone; nobody saw how the job ended"
    assert shell.written(name)["state"] == "lost"


def test_a_step_that_outlives_its_supervisor_still_runs_and_can_be_cancelled(shell):
    name = shell.submit("trap '' TERM; sleep 61; sleep 62")
    handle = shell.running(name)
    time.sleep(0.5)  # the trap
    os.kill(handle["supervisor"], signal.SIGKILL)
    wait_for(lambda: "nobody will see how it ends" in shell.status(name)["reason"])
    assert shell.state(name) == "running"
    subprocess.run(["pkill", "-9", "-s", str(handle["pid"])], check=True)  # faster than the grace of cancel
    assert shell.jobs("cancel", name).returncode == 0
    assert not processes.session_lives(handle["pid"], handle["started"])


def test_another_process_with_the_pid_of_a_supervisor_is_not_it(shell):
    name = shell.submit("sleep 60")
    status = shell.written(name) | {"handle": shell.running(name)}
    shell.jobs("cancel", name)
    status["handle"] |= {"supervisor": os.getpid(), "pid": os.getpid()}
    (shell.directory(name) / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert shell.state(name) == "lost"
    assert shell.jobs("cancel", name).returncode == 0  # and we still live


def asked(shell, name: str, **changes) -> Path:
    """A job directory as a submission leaves it that dies before it has started anything."""
    model = shell.submit("true")
    text = (shell.directory(model) / "job.yaml").read_text()
    directory = shell.directory(name)
    directory.mkdir()
    for key, value in changes.items():
        text = re.sub(rf"^( *){key}: .*$", rf"\1{key}: {value}", text, flags=re.M)
    (directory / "job.yaml").write_text(text)
    return directory


NAME = "20260101-000000-data_prep-demo_chat-0123ab"


@pytest.mark.parametrize(
    ("lives", "at", "state"),
    [
        (False, "'2026-01-01T00:00:00+00:00'", "lost"),
        (True, "'2026-01-01T00:00:00+00:00'", "pending"),
        (False, "'2999-01-01T00:00:00+00:00'", "pending"),
    ],
)
def test_a_submission_that_died_half_way_is_found(shell, lives, at, state):
    pid = os.getpid() if lives else 1 << 22
    directory = asked(shell, NAME, pid=pid, started=f"'{processes.started(pid)}'", submitted_at=at)
    known = shell.status("0123ab")
    assert known["state"] == state
    if state == "lost":
        assert known["reason"] == "its submission died before the job was started"
        assert json.loads((directory / "status.json").read_text())["state"] == "lost"
    else:
        assert not (directory / "status.json").exists()


@pytest.mark.parametrize("content", [None, "", "[]", "a: [", "just text", "step: x\n", "\x00\xff"])
def test_half_a_directory_does_not_disturb_the_list(shell, content):
    whole = shell.submit("true")
    broken = shell.directory(NAME)
    broken.mkdir()
    if content is not None:
        (broken / "job.yaml").write_text(content)
    (shell.cwd / ".steps/jobs/notes.txt").touch()
    os.utime(broken, (0, 0))
    listed = {job["id"]: job for job in shell.list()}
    assert set(listed) == {whole, NAME}
    assert listed[NAME]["state"] == "lost"
    assert listed[NAME]["reason"]
    assert shell.jobs("list").returncode == 0
    assert "rm -r" in shell.jobs("status", NAME).stdout
    for command, code in ((["logs"], 5), (["rerun"], 2), (["logs", "-f"], 5)):
        done = shell.jobs(*command, NAME)
        assert done.returncode == code
        assert "error: " in done.stderr
    assert shell.jobs("cancel", NAME).returncode == 0


def test_a_directory_that_is_being_made_is_not_lost_yet(shell):
    shell.directory(NAME).mkdir(parents=True)
    assert shell.state(NAME) == "pending"
    done = shell.jobs("cancel", NAME)
    assert (done.returncode, "is being written down at this moment" in done.stderr) == (5, True)
    os.utime(shell.directory(NAME), (0, 0))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": 3, "more": 1}'])
def test_a_damaged_status_does_not_disturb_the_list(shell, text):
    name = shell.submit("true")
    wait_for(lambda: shell.state(name) == "succeeded")
    (shell.directory(name) / "status.json").write_text(text)
    assert shell.list()[0]["state"] == "lost"


def test_twenty_shells_at_once_while_jobs_run(shell):
    names = [shell.submit(f"sleep {number * 0.7}", more=[f"output_dir=out{number}"]) for number in range(1, 4)]
    command, pipes = [*STEPS, "jobs", "list", "--json"], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    shells = [subprocess.Popen(command, cwd=shell.cwd, **pipes) for _ in range(20)]
    for child in shells:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, b"")
        told = {job["id"]: job["state"] for job in json.loads(out)}
        assert set(told) == set(names)
        assert set(told.values()) <= {"pending", "running", "succeeded"}
    wait_for(lambda: all(shell.written(name)["state"] == "succeeded" for name in names))
    assert list(shell.cwd.glob(".steps/jobs/*/.*")) == []


def test_list_shows_what_was_asked_for(shell):
    ran = shell.submit("true")
    failed = shell.submit("exit 1")
    wait_for(lambda: [shell.state(ran), shell.state(failed)] == ["succeeded", "failed"])
    assert [job["id"] for job in shell.list("--state", "failed")] == [failed]
    done = shell.jobs("list", "--state", "fialed")
    assert done.returncode == 2
    assert "Did you mean failed?" in done.stderr
    assert shell.jobs("list", "--state", "lost").stderr.startswith("no jobs in ")


def test_list_keeps_to_the_newest_unless_asked(shell):
    first = shell.submit("true")
    wait_for(lambda: shell.state(first) == "succeeded")
    for number in range(24):
        copy = shell.directory(f"20270101-0000{number:02}-data_prep-demo_chat-00{number:04x}")
        copy.mkdir()
        for name in ("job.yaml", "status.json"):
            (copy / name).write_text((shell.directory(first) / name).read_text())
    done = shell.jobs("list")
    assert len(done.stdout.splitlines()) == 21
    assert done.stderr == "5 older jobs have ended: --all shows them\n"
    assert len(shell.list("--all")) == 25
    assert all(" data_prep/demo_chat " in line for line in done.stdout.splitlines()[1:])  # piped: not wrapped, not cut


def test_jobs_are_named_in_any_way_that_is_clear(shell):
    one, two = shell.submit("true"), shell.submit("true")
    assert shell.status(one)["id"] == one
    assert shell.status(one[-6:])["id"] == one
    assert shell.status("latest")["id"] == two
    assert shell.status(str(shell.directory(one)))["id"] == one
    assert shell.status(f".steps/jobs/{one}")["id"] == one
    below = shell.cwd / "below"
    below.mkdir()
    assert Shell(below).status("latest")["id"] == two
    done = shell.jobs("status", "demo_chat")
    assert done.returncode == 2
    assert one in done.stderr
    assert two in done.stderr
    assert shell.jobs("status", "").returncode == 2
    assert shell.jobs("status", "nothing").returncode == 2


def test_completion_knows_the_jobs(shell, monkeypatch):
    one, two = shell.submit("true"), shell.submit("true")
    monkeypatch.chdir(shell.cwd)
    assert complete.job_ids("") == ["latest", two, one]
    assert complete.job_ids(one) == [one]
    assert complete.job_ids(one[-6:]) == [one[-6:]]
    assert complete.states("c") == ["cancelled"]


def test_ctrl_c_on_logs_only_stops_watching(shell):
    name = shell.submit("echo begun", "sleep 60")
    shell.running(name)
    child = subprocess.Popen(
        [*STEPS, "jobs", "logs", "-f", name], cwd=shell.cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    short = name.rpartition("-")[2]
    told = f"job {short} goes on (steps jobs cancel {short} ends it)"
    assert (child.returncode, out, err.strip()) == (130, "", told)
    assert shell.state(name) == "running"


@pytest.mark.parametrize("follow", ["", "-f"])
@pytest.mark.parametrize("where", ["| head -1", ">/dev/full", ">&-"])
def test_a_screen_that_cannot_be_written_is_no_failure(shell, where, follow):
    name = shell.submit("seq 100000", "exit 1")
    wait_for(lambda: shell.written(name)["state"] == "failed")
    command = f"{sys.executable} -m steps jobs logs {follow} {name} {where}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=shell.cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == (f"job {name} failed: exit code 1\n" if follow else "")


def test_rerun_asks_the_same_again_from_anywhere(shell, tmp_path_factory):
    old = shell.submit("true", more=["output_dir=again"])
    wait_for(lambda: shell.state(old) == "succeeded")
    done = steps("jobs", "rerun", str(shell.directory(old)), cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    new = re.match(r"job (\S+) is pending", done.stdout)[1]
    assert new != old
    wait_for(lambda: shell.state(new) == "succeeded")
    assert (shell.directory(new) / "config.yaml").read_text() == (shell.directory(old) / "config.yaml").read_text()


def test_rerun_stays_when_the_job_was_stayed_with(shell):
    assert shell(*CHAT).returncode == 0
    done = shell.jobs("rerun", "latest")
    assert done.returncode == 0
    assert "raw_jsonl written to output/tiny/chat" in done.stdout
    assert re.match(r"job \S+\n", done.stderr)
    assert shell.jobs("rerun", "-b", "latest").stdout.startswith("job ")
    assert shell.jobs("rerun", "-b", "-r", "latest").returncode == 2


def test_rerun_checks_the_inputs_again(shell):
    assert shell(*CHAT).returncode == 0
    assert shell("run", "sft_packing", "-c", "tiny").returncode == 0
    packing = shell.status("latest")["id"]
    (shell.cwd / "output/tiny/chat").rename(shell.cwd / "moved")
    done = shell.jobs("rerun", packing)
    assert done.returncode == 4
    assert "output/tiny/chat" in done.stderr
    assert len(shell.list()) == 2


def test_rerun_takes_secrets_from_the_environment(shell):
    secret = "hf_0123456789abcdef"
    words = ["run.env.env_vars.HF_TOKEN=${oc.env:MINE}", "run.env.env_vars.DB_PASSWORD=${oc.env:MINE}"]
    show = "echo $(printf %s $HF_TOKEN | wc -c) letters and $(printf %s $DB_PASSWORD | wc -c)"
    name = shell.submit(show, more=[*words, "run.env.env_vars.EMPTY_TOKEN="], env={"MINE": secret})
    wait_for(lambda: shell.state(name) == "succeeded")
    done = shell.jobs("rerun", name)
    assert done.returncode == 3
    assert "run.env.env_vars.HF_TOKEN" in done.stderr
    assert "run.env.env_vars.DB_PASSWORD" in done.stderr
    assert "EMPTY_TOKEN" not in done.stderr
    done = shell.jobs("rerun", "-r", name, env={"HF_TOKEN": secret, "DB_PASSWORD": "x" * 12})
    assert done.returncode == 0, done.stderr
    assert "19 letters and 12" in done.stdout
    written = [path.read_bytes() for path in (shell.cwd / ".steps").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [text for text in written if b"x" * 12 in text or secret.encode() in text] == []
