"""Jobs on this machine: directories, exit codes, signals, secrets, bars. Real processes throughout."""

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

import pytest
from support.steps import steps

STEP = ["run", "data_prep/demo_chat", "-c", "tiny"]


def jobs(cwd: Path) -> list[Path]:
    return sorted((cwd / ".steps" / "jobs").glob("*"))


def status(job: Path) -> dict:
    return json.loads((job / "status.json").read_text())


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_run_leaves_its_directory(tmp_path):
    done = steps(*STEP, "max_conversations=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (job,) = jobs(tmp_path)
    assert re.fullmatch(r"\d{8}-\d{6}-data_prep-demo_chat-[0-9a-f]{6}", job.name)
    assert {"job.yaml", "config.yaml", "command.sh", "log", "status.json"} <= {path.name for path in job.iterdir()}
    assert status(job)["state"] == "succeeded"
    assert status(job)["exit_code"] == 0
    assert "max_conversations: 5" in (job / "config.yaml").read_text()
    assert "raw_jsonl written to output/tiny/chat" in (job / "log").read_text()
    record = json.loads((tmp_path / "output/tiny/chat/artifact.json").read_text())
    assert record["producer"]["job"] == job.name


def test_many_runs_in_one_second_get_a_directory_each(tmp_path):
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "steps", *STEP, "max_conversations=3", f"output_dir=out{number}"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        for number in range(4)
    ]
    assert [child.wait(120) for child in children] == [0] * 4
    assert len(jobs(tmp_path)) == 4
    assert {status(job)["state"] for job in jobs(tmp_path)} == {"succeeded"}


def test_a_failed_step_is_a_failed_command_with_its_message(tmp_path):
    (tmp_path / "chats.jsonl").write_text("not json\n")
    done = steps("run", "sft_packing", "-c", "tiny", "blend_path=chats.jsonl", "output_dir=packed", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: " in done.stdout  # the step's own words, from the log
    assert "data_prep/sft_packing failed: exit code 1" in done.stderr
    (job,) = jobs(tmp_path)
    assert (status(job)["state"], status(job)["exit_code"]) == ("failed", 1)
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "packed").exists()


def test_what_changes_between_check_and_start_is_still_caught(tmp_path):
    """The job checks again: a config.yaml run by hand without its input fails by name."""
    done = steps(*STEP, "max_conversations=3", cwd=tmp_path)
    assert done.returncode == 0
    config = tmp_path / "config.yaml"
    config.write_text("blend_path: nowhere\ntokenizer: {model: nowhere}\noutput_dir: out\n")
    done = subprocess.run(
        [sys.executable, "-m", "steps.data_prep.sft_packing.step", "--config", str(config)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "there is no training_jsonl at nowhere" in done.stderr
    assert "[missing_training_jsonl]" in done.stderr


def test_detached_returns_at_once_and_the_job_goes_on(tmp_path):
    done = steps(*STEP[:2], "-c", "tiny", "-b", "local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (job,) = jobs(tmp_path)
    assert job.name in done.stdout
    wait_for(lambda: status(job)["state"] not in ("pending", "running"))
    assert status(job)["state"] == "succeeded"
    assert (tmp_path / "output/tiny/chat/artifact.json").exists()


def test_values_arrive_as_data_not_as_shell(tmp_path):
    name = 'it\'s $(touch pwned) `touch pwned` "quoted"; touch pwned'
    done = steps(
        *STEP, "max_conversations=3", f"output_dir={name}", f"run.env.env_vars.GREETING={name}", "--debug", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name / "artifact.json").exists()
    assert not (tmp_path / "pwned").exists()


def test_names_of_environment_variables_are_no_shell_either(tmp_path):
    done = steps(*STEP, "run.env.env_vars.A;touch${IFS}pwned;B=1", cwd=tmp_path)
    assert done.returncode == 3
    assert "is no name of an environment variable" in done.stderr
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("where", ["| true", ">/dev/full", ">&-"])
def test_a_screen_that_cannot_be_written_never_ends_the_job(tmp_path, where):
    command = f"{sys.executable} -m steps {' '.join(STEP)} {where}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, stderr=subprocess.DEVNULL)
    (job,) = jobs(tmp_path)
    assert status(job)["state"] == "succeeded"
    assert (tmp_path / "output/tiny/chat/artifact.json").exists()


def test_processes_under_torchrun_fail_once_with_their_own_exit_code(tmp_path):
    """The input vanishes between check and start: every process finds out, one tells, and the code is theirs."""
    (tmp_path / "config.yaml").write_text(
        "engine: torch\nrecipe: {seq_length: 8}\ndataset: {nano3_packed_sft_dir: nowhere}\n"
        "train: {train_iters: 1, global_batch_size: 2}\ncheckpoint: {pretrained_checkpoint: nowhere, save: out}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "steps.runtime.torchrun", "--standalone", "--nproc-per-node=2",
         "-m", "steps.peft.megatron_bridge.step", "--config", "config.yaml"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.count("there is no packed_parquet at nowhere") == 1
    assert "Traceback" not in done.stderr


def test_secrets_never_reach_the_disk_or_the_screen(tmp_path):
    secret = "hf_0123456789abcdef"
    done = steps(
        *STEP, f"run.env.env_vars.HF_TOKEN={secret}", "run.env.env_vars.DB_PASSWORD=${oc.env:PW}",
        cwd=tmp_path, env={"PW": secret},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if secret.encode() in path.read_bytes()] == []
    assert secret not in done.stdout + done.stderr
    assert "HF_TOKEN: <secret>" in (jobs(tmp_path)[0] / "job.yaml").read_text()


def test_a_secret_arrives_in_the_job_all_the_same(tmp_path):
    """What the step sees is what its process was started with."""
    secret = "hf_0123456789abcdef"
    command = [sys.executable, "-m", "steps", *STEP, f"run.env.env_vars.HF_TOKEN={secret}"]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'steps.data_prep' in ' '.join(sys.orig_argv):\n"
        "    open(os.environ['SEEN'], 'w').write(os.environ.get('HF_TOKEN', ''))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SEEN": str(tmp_path / "seen")}
    assert subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "seen").read_text() == secret


def test_a_secret_in_the_configuration_itself_is_refused(tmp_path):
    done = steps(*STEP, "+wandb_api_key=abc", cwd=tmp_path)
    assert done.returncode == 3
    assert "looks like a secret" in done.stderr


def _signals_as_in_a_terminal() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def endless(tmp_path):
    """A running step that would take a minute: packing 80 MB of conversations."""
    words = " ".join(f"word{number}" for number in range(150))
    row = {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": words}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(row) + "\n") * 30_000)
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "steps",
            "run",
            "sft_packing",
            "-c",
            "tiny",
            "blend_path=chats.jsonl",
            "output_dir=packed",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts what it puts into the background (this test suite, say) with Ctrl-C ignored.
        preexec_fn=_signals_as_in_a_terminal,
    )
    wait_for(lambda: jobs(tmp_path) and (jobs(tmp_path)[0] / "status.json").exists())
    time.sleep(1.0)
    yield child, jobs(tmp_path)[0]
    if child.poll() is None:
        child.kill()
    child.wait()
    child.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_the_job_with_130(endless, number):
    child, job = endless
    child.send_signal(number)
    assert child.wait(40) == 130
    assert status(job)["state"] == "cancelled"
    assert not alive(status(job)["handle"]["pid"])
    assert "Traceback" not in child.stdout.read()


def test_kill_9_on_the_command_leaves_no_step_behind(endless):
    child, job = endless
    pid = status(job)["handle"]["pid"]
    assert alive(pid)
    child.kill()
    child.wait()
    wait_for(lambda: not alive(pid), 20)


def test_a_killed_step_is_a_failure_that_says_so(endless):
    child, job = endless
    os.kill(status(job)["handle"]["pid"], signal.SIGKILL)
    assert child.wait(20) == 137
    assert "killed by SIGKILL" in child.stdout.read()
    assert status(job)["reason"].startswith("killed by SIGKILL")


def test_bars_on_a_terminal_and_plain_lines_elsewhere(tmp_path):
    packing = ["run", "data_prep/sft_packing", "-c", "tiny"]
    assert steps(*STEP, cwd=tmp_path).returncode == 0
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "steps", *packing], cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(slave)
    screen = b""
    while select.select([master], [], [], 60)[0]:
        try:
            block = os.read(master, 65536)
        except OSError:
            break
        if not block:
            break
        screen += block
    assert child.wait() == 0
    os.close(master)
    assert b"\x1b[" in screen
    assert "━" in screen.decode(), "a bar was drawn"
    assert b"\x1b[" not in (jobs(tmp_path)[-1] / "log").read_bytes()
    assert "━" not in steps(*packing, "force=true", cwd=tmp_path).stdout
