"""Submission to a real Slurm, through NeMo-Run: what arrives, what is refused, and what is left behind."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.slurm_site import DEMO, Site, Submitted, everything_written, refused

pytest.importorskip("nemo_run", reason="nemo_run is not installed (pip install 'peft-steps[cluster]')")

ODD = """a b "c" 'd' $(touch pwned) `touch pwned` back\\slash # hash; end\\"""


@pytest.fixture
def site(tmp_path, cluster) -> Site:
    directory = tmp_path / "a site"  # a space in every path of every test
    directory.mkdir()
    return Site(directory, cluster)


def test_values_arrive_as_data(site):
    """Spaces, quotes, substitutions, backslashes: in sbatch's options, in the environment and in the configuration."""
    comment, odd = json.dumps(ODD), json.dumps(ODD + "\nsecond line")
    site.profile(f'time = "12:00:00"\ncomment = {comment}\nsetup_lines = "printenv odd"\nenv_vars = {{odd = {odd}}}')
    job = site.submit(*DEMO, f"output_dir={site.directory}/out $(touch pwned) 'x'")
    job.succeed()
    shown = site.cluster.run("scontrol", "show", "job", str(job.number)).stdout
    assert f"   Comment={ODD} \n" in shown
    assert "TimeLimit=12:00:00 " in shown
    assert f"JobName={job.directory.name}\n" in shown
    assert job.log.startswith(ODD + "\nsecond line\n")
    assert (site.directory / "out $(touch pwned) 'x'/conversations.jsonl").read_bytes()
    assert not list(site.directory.rglob("pwned"))


def test_what_a_job_leaves(site):
    """Its own files, in its own directory; the code that was here; the output where a local run would have put it."""
    site.profile("")
    job = site.submit(*DEMO)
    job.succeed()
    assert job.there == job.directory
    assert (job.there / "exit_code").read_text() == "0\n"
    assert int((job.there / "slurm_job_id").read_text()) == job.number
    assert job.status["handle"]["cluster"] == "private"
    for name in ("started_at", "ended_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\n", (job.there / name).read_text())
    assert json.loads((job.there / "summary.json").read_text())
    assert not list((job.there / "work").iterdir())
    assert not list((job.there / "code").rglob("__pycache__/*.py"))
    assert (site.directory / "output/tiny/chat/artifact.json").exists()
    assert sorted(path.name for path in site.directory.iterdir()) == [".steps", "env.toml", "output"]


def test_another_directory_on_the_cluster(site, tmp_path):
    site.profile(f'remote_job_dir = "{tmp_path}/on 100% the cluster"')
    job = site.submit(*DEMO)
    assert job.there == tmp_path / "on 100% the cluster/jobs" / job.directory.name
    job.succeed()
    assert "written to" in job.log
    assert not (job.directory / "code").exists()


def test_secrets_are_nowhere(site, tmp_path):
    """In no file of the job, of Slurm or of ours, in nothing that Slurm shows: only in the job's environment."""
    secret = "hush-$(touch pwned)-'quoted'-7d3f"
    site.profile(
        'setup_lines = \'[ "$HF_TOKEN" = "$(cat expected)" ] && echo known\'\n'
        'env_vars = {HF_TOKEN = "${oc.env:MINE}", OTHER_KEY = "prefix ${oc.env:MINE}"}'
    )
    # The job must wait while we look: Slurm holds what it was given until it starts.
    with site.closed():
        job = site.submit(*DEMO, env={"MINE": secret})
        file = site.directory / ".steps/secrets" / job.directory.name
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        written = everything_written(site.directory, site.cluster.directory)
        assert any(path.name == "script" for path in written), "Slurm's copy of the script is among them"
        assert [path for path, data in written.items() if b"hush-" in data] == [file]
        shown = site.cluster.run("scontrol", "--detail", "show", "job", str(job.number)).stdout
        shown += site.cluster.run("scontrol", "write", "batch_script", str(job.number), "-").stdout
        assert "#SBATCH" in shown
        assert "hush-" not in shown
        (job.there / "work/expected").write_text(secret)
    job.succeed()
    assert job.log.startswith("known\n")
    assert not file.exists()
    written = everything_written(site.directory, site.cluster.directory)
    assert [path for path, data in written.items() if b"hush-" in data] == [job.there / "work/expected"]
    assert not list(site.directory.rglob("pwned"))


def test_secrets_that_are_gone(site):
    site.profile('env_vars = {HF_TOKEN = "hush-hush-hush"}')
    with site.closed():
        job = site.submit(*DEMO)
        (site.directory / ".steps/secrets" / job.directory.name).unlink()
    assert job.end()["ExitCode"] == "5:0"
    assert "error: the job's secrets are gone (" in job.log
    assert (job.there / "exit_code").read_text() == "5\n"


def test_a_bad_partition(site):
    site.profile('partition = "nosuch"\nenv_vars = {HF_TOKEN = "hush-hush-hush"}')
    job = refused(site, "invalid partition specified: nosuch", "`sinfo` lists")
    assert site.cluster.run("squeue", "--noheader", "--states=all", f"--name={job.name}").stdout == ""


def test_more_than_the_cluster_has(site):
    site.profile("gpus_per_node = 64")
    refused(site, "node configuration is not available", "sinfo -Nl")


def test_the_controller_is_down(site):
    site.profile('env_vars = {HF_TOKEN = "hush-hush-hush"}')
    site.cluster.stop_controller()
    try:
        refused(site, "Unable to contact slurm controller", "scontrol ping")
    finally:
        site.cluster.start_controller()


def test_a_directory_that_cannot_be_written(site):
    site.profile('remote_job_dir = "/proc/nowhere"')
    refused(site, "the job's directory cannot be made", "/proc/nowhere")


def test_a_full_disk(site, tmp_path):
    """A file system of its own, too small for the code."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (needs root)")
    try:
        site.profile(f'remote_job_dir = "{small}"')
        refused(site, f"no space left in {small}", "Free some space")
        assert not list(small.rglob("jobs/*"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_no_sbatch(site):
    site.profile("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(site.env, "PATH", f"{Path(sys.executable).parent}:/bin:/usr/bin")
        empty = site.directory / "bin"
        empty.mkdir()
        for name in ("bash", "sh", "mkdir", "head", "grep", "rm", "cat", "id"):
            (empty / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
        patch.setitem(site.env, "PATH", str(empty))
        refused(site, "there is no sbatch on this machine", "tunnel: ssh")


def test_a_job_that_fails(site):
    """The step's own exit code is the job's."""
    site.profile('startup_commands = ["echo before the step", "exit 3"]')
    job = site.submit(*DEMO)
    assert job.end()["ExitCode"] == "3:0"
    assert (job.there / "exit_code").read_text() == "3\n"
    assert "before the step\n" in job.log
    assert "written to" not in job.log


def test_a_cancelled_job_has_no_exit_code_of_ours(site):
    """Slurm knows why it ended; 143 would hide that."""
    site.profile('startup_commands = ["echo started", "sleep 60"]')
    job = site.submit(*DEMO)
    site.cluster.wait_for(job.number, "RUNNING")
    deadline = time.monotonic() + 20
    while "started" not in job.log and time.monotonic() < deadline:
        time.sleep(0.05)
    site.cluster.run("scancel", str(job.number), check=True)
    assert job.end()["JobState"] == "CANCELLED"
    time.sleep(0.5)
    assert not (job.there / "exit_code").exists()


def test_jobs_that_wait_for_each_other(site):
    site.profile("")
    with site.closed():
        first = site.submit(*DEMO)
        second = site.submit(*DEMO, "output_dir=other", "--after", first.directory.name)
        assert f"afterok:{first.number}" in site.cluster.show(second.number)["Dependency"]
    second.succeed()
    assert first.end()["EndTime"] <= site.cluster.show(second.number)["StartTime"]
    # What has succeeded needs no waiting for; what has failed cannot be waited for.
    third = site.submit(*DEMO, "output_dir=third", "--after", first.directory.name)
    assert site.cluster.show(third.number)["Dependency"] == "(null)"
    site.profile('startup_commands = ["exit 3"]', name="broken")
    failed = site.submit(*DEMO, "output_dir=fourth", profile="broken")
    failed.end()
    done = site.steps("run", *DEMO, "output_dir=fifth", "-b", "here", "--after", failed.directory.name)
    assert done.returncode == 2
    assert "exit code 3" in done.stderr


def test_a_job_whose_predecessor_fails_never_runs(site):
    site.profile('startup_commands = ["exit 3"]', name="broken")
    site.profile("")
    with site.closed():
        first = site.submit(*DEMO, profile="broken")
        second = site.submit(*DEMO, "output_dir=other", "--after", first.directory.name)
    assert second.end()["JobState"] == "CANCELLED"
    assert not (second.there / "started_at").exists()


def test_a_submission_that_dies(site, cluster):
    """kill -9 at any moment: status.json tells where to look, and the queue knows the job by its name, or has none."""
    site.profile('env_vars = {HF_TOKEN = "hush-hush-hush"}')
    for delay in (0.2, 0.6, 1.0):
        before = set(site.jobs())
        process = site.start("run", *DEMO, f"output_dir=out{delay}", "-b", "here")
        deadline = time.monotonic() + 60
        while not (new := [job for job in set(site.jobs()) - before if (job / "status.json").exists()]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        status = json.loads((new[0] / "status.json").read_text())
        assert status["state"] == "pending"
        assert status["handle"]["directory"] == str(new[0])
        queued = cluster.run("squeue", "--noheader", "--states=all", f"--name={new[0].name}").stdout.splitlines()
        assert len(queued) == (1 if "slurm_job_id" in status["handle"] else len(queued))


def test_ctrl_c_while_submitting(site, cluster):
    site.profile('env_vars = {HF_TOKEN = "hush-hush-hush"}')
    process = site.start("run", *DEMO, "-b", "here")
    deadline = time.monotonic() + 60
    while not any((job / "work").exists() for job in site.jobs()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: interrupted: the job was not submitted\n")
    (job,) = site.jobs()
    assert json.loads((job / "status.json").read_text())["state"] == "cancelled"
    assert not list(site.directory.rglob(".steps/secrets/*"))
    assert cluster.run("squeue", "--noheader", f"--name={job.name}").stdout == ""


def test_twenty_at_once(site, cluster):
    """Twenty processes submit in one directory: twenty jobs, each with its own number and its own output."""
    site.profile("")
    started = [
        site.start("run", *DEMO, f"output_dir=out{number}", "-b", "here", env={"OMP_NUM_THREADS": "1"})
        for number in range(20)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, ""), out
    jobs = [Submitted(directory, cluster) for directory in site.jobs()]
    assert len({job.number for job in jobs}) == 20
    for job in jobs:
        assert site.cluster.show(job.number)["JobName"] == job.directory.name
        job.succeed(timeout=120)
    assert len(list(site.directory.glob("out*/conversations.jsonl"))) == 20


def test_slurm_answers_too_late(site, tmp_path):
    """sbatch gives up waiting for an answer: whether the job is there is asked by its name."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f'#!/bin/bash\n[ -e {tools}/lost ] || {shutil.which("sbatch")} "$@" > /dev/null\n'
        'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2\nexit 1\n'
    )
    (tools / "sbatch").chmod(0o755)
    site.env["PATH"] = f"{tools}:{site.cluster.env['PATH']}"
    site.profile("")
    job = site.submit(*DEMO)
    assert site.cluster.show(job.number)["JobName"] == job.directory.name
    job.succeed()
    (tools / "lost").touch()
    refused(site, "Socket timed out")


def test_slurm_answers_too_late_and_is_gone(site, tmp_path):
    """Nobody can say whether the job is there: it stays pending, and is asked for later."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue"):
        (tools / name).write_text(
            f"#!/bin/sh\necho '{name}: error: Socket timed out on send/recv operation' >&2\nexit 1\n"
        )
        (tools / name).chmod(0o755)
    site.env["PATH"] = f"{tools}:{site.cluster.env['PATH']}"
    site.profile('env_vars = {HF_TOKEN = "hush-hush-hush"}')
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 5
    assert "Socket timed out" in done.stderr
    assert "steps jobs" in done.stderr
    (job,) = site.jobs()
    status = json.loads((job / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("pending", "being submitted")
    assert (site.directory / ".steps/secrets" / job.name).exists(), "the job may need them"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; sys.modules['nemo_run'] = None", "is not installed"),
        ("import sys; sys.modules['paramiko'] = None", "NeMo-Run cannot be imported"),
    ],
)
def test_without_nemo_run(site, tmp_path, text, words):
    (tmp_path / "sitecustomize.py").write_text(text)
    site.env["PYTHONPATH"] = str(tmp_path)
    site.profile('env_vars = {HF_TOKEN = "hush-hush-hush"}')
    refused(site, words, "pip install 'peft-steps[cluster]'")


def test_nothing_of_nemo_run_stays(site, tmp_path):
    """Neither its home nor what it says, and the job does not inherit it."""
    site.env |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    (tmp_path / "home").mkdir()
    site.profile('setup_lines = "echo home=$NEMORUN_HOME."')
    job = site.submit(*DEMO)
    job.succeed()
    assert job.log.startswith("home=.\n")
    assert not list((tmp_path / "home").iterdir())
    assert not list(tmp_path.rglob("*nemo-run*"))


def test_a_directory_that_is_gone_when_the_job_starts(site):
    """Slurm would run the job in /tmp."""
    site.profile("")
    with site.closed():
        job = site.submit(*DEMO)
        (job.there / "work").rmdir()
    assert job.end()["ExitCode"] == "5:0"
    assert f"error: {job.there} is not on " in job.log


def test_a_setup_that_is_not_strict(site):
    """`module load` and its like read variables that are not set and fail halfway."""
    site.profile('setup_lines = ["module() { [ -z $NOT_SET ] && false | true; false; }", "module load cuda"]')
    site.submit(*DEMO).succeed()
