"""`steps run -r PROFILE` on a real Slurm, on its login node and through ssh: what a person in front of it gets."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from support.slurm_site import DEMO, Site

pytest.importorskip("nemo_run", reason="nemo_run is not installed (pip install 'peft-steps[cluster]')")

TICKS = 'startup_commands = ["for i in $(seq 60); do echo tick $i at $(date +%s); sleep 1; done"]\n'


@dataclass
class Front(Site):
    """reach: the lines of a profile that lead to the cluster."""

    reach: str = ""


@pytest.fixture(params=["login node", "ssh"])
def site(request, tmp_path, cluster) -> Front:
    """A place where [here] reaches the cluster, whatever else a test adds to that profile."""
    site = Front(tmp_path, cluster)
    if request.param == "ssh":
        sshd = request.getfixturevalue("sshd")
        sshd.write_ssh(tmp_path / "bin")
        site.env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{cluster.env['PATH']}"
        site.env["SLURM_CONF"] = "/nowhere"
        reach = f'host = "{sshd.host}"\nport = {sshd.port}\nuser = "{sshd.user}"\nidentity = "{sshd.identity}"\n'
        site.reach = f'tunnel = "ssh"\n{reach}remote_job_dir = "{tmp_path}/there"\nworkspace = "{tmp_path}"\n'
    return site


def test_a_job_is_watched_to_its_end(site):
    site.profile(site.reach)
    done = site.steps("run", *DEMO, "-r", "here")
    assert done.returncode == 0, done.stderr
    assert "raw_jsonl written to" in done.stdout  # the job's own words
    assert "data_prep/demo_chat done in" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    (job,) = site.jobs()
    assert json.loads((job / "status.json").read_text())["state"] == "succeeded"
    assert "raw_jsonl written to" in (job / "log").read_text()
    assert json.loads((job / "summary.json").read_text())["conversations"] == 3


def test_lines_arrive_while_it_runs_and_ctrl_c_cancels(site):
    site.profile(site.reach + TICKS)
    running = site.start("run", *DEMO, "-r", "here")
    delays = []
    for line in running.stdout:
        if line.startswith("tick"):
            delays.append(time.time() - int(line.split()[-1]))
            if len(delays) == 4:
                break
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    # 2 seconds, and the 1 that `date +%s` cuts off; the median, since a busy machine may stall once.
    assert median(delays) < 3, delays
    (job,) = site.jobs()
    assert json.loads((job / "status.json").read_text())["state"] == "cancelled"
    assert site.cluster.run("squeue", "--noheader").stdout == ""


def test_a_failing_job_ends_the_command_with_its_code_and_the_end_of_its_log(site):
    site.profile(site.reach + 'startup_commands = ["echo the last words", "exit 3"]')
    done = site.steps("run", *DEMO, "-r", "here")
    assert done.returncode == 3
    assert "the last words" in done.stdout
    assert "data_prep/demo_chat failed: exit code 3" in done.stderr
    status = site.steps("jobs", "status", "latest")
    assert "failed" in status.stdout
    assert "the last words" in status.stdout


def test_scancel_from_outside_is_told(site):
    site.profile(site.reach + TICKS)
    running = site.start("run", *DEMO, "-r", "here")
    for line in running.stdout:
        if line.startswith("tick"):
            break
    site.cluster.run("scancel", "--user", str(os.getuid()), check=True)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "data_prep/demo_chat was cancelled" in err
    (job,) = site.jobs()
    assert json.loads((job / "status.json").read_text())["state"] == "cancelled"


def test_a_detached_job_is_followed_cancelled_and_run_again_from_other_shells(site):
    site.profile(site.reach + TICKS)
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 0, done.stderr
    (job,) = site.jobs()
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:]] == [
        ["steps", "jobs", "status"], ["steps", "jobs", "logs"], ["steps", "jobs", "cancel"],
    ]  # fmt: skip
    logs = site.start("jobs", "logs", "-f", job.name[-6:])
    assert next(line for line in logs.stdout if line.startswith("tick"))
    listed = json.loads(site.steps("jobs", "list", "--json").stdout)
    assert [row["state"] for row in listed] == ["running"]
    assert site.steps("jobs", "cancel", "latest").returncode == 0
    logs.communicate(timeout=30)
    listed = json.loads(site.steps("jobs", "list", "--json").stdout)
    assert [row["state"] for row in listed] == ["cancelled"]
    again = site.steps("jobs", "rerun", job.name)
    assert again.returncode == 0, again.stderr
    assert site.steps("jobs", "cancel", "latest").returncode == 0
    assert len(site.jobs()) == 2


@pytest.mark.parametrize("site", ["login node"], indirect=True)
def test_usage_and_profiles_that_are_wrong_start_nothing(site):
    site.profile(site.reach + "acount = 1")
    (site.directory / "other.toml").write_text('[odd]\nexecutor = "slrum"\n')
    for arguments, code, message in [
        (["-r", "here", "-b", "here"], 2, "-r and -b exclude each other"),
        (["-b", "here"], 5, "Did you mean account?"),
        (["-b", "odd", "--env-file", "other.toml"], 5, "Did you mean slurm?"),
        (["-b", "her", "--env-file", "env.toml"], 5, "Did you mean here?"),
        (["-b", "here", "--env-file", "nowhere.toml"], 5, "nowhere.toml"),
        (["-b", "slurm_base", "run.env.acount=x"], 3, "Did you mean run.env.account?"),
        (["-b", "slurm_base", "run.env.time=soon"], 3, "is no time limit"),
    ]:
        done = site.steps("run", *DEMO, *arguments)
        assert (done.returncode, message in done.stderr) == (code, True), (arguments, done.returncode, done.stderr)
    assert not site.jobs()
    assert Path(site.directory / "env.toml").exists()
