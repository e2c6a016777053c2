"""The private Slurm and the private sshd do what the tests built on them rely on, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import processes, sacct
from support.slurm import Cluster, ClusterError
from support.slurm_conf import NODES
from support.sshd import Sshd

pytestmark = pytest.mark.slow  # what relies on these fixtures fails without them, too
needs_slurm = pytest.mark.skipif(bool(Cluster.missing()), reason=Cluster.missing() or "found")
needs_sshd = pytest.mark.skipif(bool(Sshd.missing()), reason=Sshd.missing() or "found")
SUPPORT = Path(processes.__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def sshd() -> Iterator[Sshd]:
    with Sshd({"GREETING": 'two  words "quoted" \\ ', "OTHER": "one"}) as running:
        yield running


def until(true: Callable[[], bool], timeout: float = 20) -> bool:
    deadline = time.monotonic() + timeout
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


# Slurm


@needs_slurm
def test_a_step_runs_on_both_nodes(cluster: Cluster) -> None:
    names = cluster.run("srun", "-N2", "-n2", "sh", "-c", "echo $SLURMD_NODENAME", check=True).stdout.split()
    assert sorted(names) == list(NODES)


@needs_slurm
def test_exit_code_reason_and_output_of_a_job(cluster: Cluster) -> None:
    job = cluster.submit("echo to the log; exit 3")
    seen = cluster.wait_for(job)
    assert (seen["JobState"], seen["ExitCode"], seen["Reason"]) == ("FAILED", "3:0", "NonZeroExitCode")
    assert (cluster.directory / f"{job}.out").read_text() == "to the log\n"


@needs_slurm
def test_twenty_jobs_run_at_the_same_time(cluster: Cluster) -> None:
    meet = cluster.directory / "meet"
    meet.mkdir()
    # each waits until it has seen all the others
    wait = f"touch {meet}/$SLURM_JOB_ID; while [ $(ls {meet} | wc -l) -lt 20 ]; do sleep 0.2; done"
    jobs = [cluster.submit(wait, "--partition=debug") for _ in range(20)]
    assert {cluster.wait_for(job)["JobState"] for job in jobs} == {"COMPLETED"}


@needs_slurm
def test_dependencies(cluster: Cluster) -> None:
    good, bad = cluster.submit("sleep 0.5"), cluster.submit("sleep 0.5; exit 1")
    after_good = cluster.submit("true", f"--dependency=afterok:{good}")
    after_bad = cluster.submit("true", f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes")
    stuck = cluster.submit("true", f"--dependency=afterok:{bad}")
    assert cluster.show(after_good)["Dependency"] == f"afterok:{good}(unfulfilled)"
    assert cluster.wait_for(after_good)["JobState"] == "COMPLETED"
    ended = cluster.wait_for(after_bad)
    assert (ended["JobState"], ended["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied")
    assert cluster.show(stuck)["JobState"] == "PENDING"
    cluster.run("scancel", str(stuck), check=True)


@needs_slurm
def test_a_cancelled_job(cluster: Cluster) -> None:
    job = cluster.submit("sleep 60")
    cluster.wait_for(job, "RUNNING")
    cluster.run("scancel", str(job), check=True)
    assert cluster.wait_for(job)["JobState"] == "CANCELLED"


@needs_slurm
def test_a_lost_node_fails_its_job_and_comes_back(cluster: Cluster) -> None:
    job = cluster.submit("srun sleep 60", "-N2", "--no-requeue")
    cluster.wait_for(job, "RUNNING")
    assert until(lambda: bool(members_on(cluster, "n2")))
    cluster.kill_node("n2")
    assert not members_on(cluster, "n2")
    ended = cluster.wait_for(job)
    assert (ended["JobState"], ended["Reason"]) == ("NODE_FAIL", "NodeDown")
    cluster.start_node("n2")
    assert cluster.run("srun", "-N2", "-n2", "true").returncode == 0


def members_on(cluster: Cluster, node: str) -> set[int]:
    job_processes = processes.members_of(cluster.directory / "nowhere", f"SLURMD_NODENAME={node}", "SLURM_JOB_ID=")
    return job_processes & processes.members_of(cluster.directory, f"SLURM_CONF={cluster.configuration}")


@needs_slurm
def test_without_its_controller_nothing_is_taken_and_nothing_forgotten(tmp_path: Path) -> None:
    columns = ["-n", "-X", "-P", "-o", "JobIDRaw,JobName,State,ExitCode"]
    with Cluster({"MessageTimeout": "2"}) as cluster:  # one second of trying in place of nine
        accounting = str(cluster.write_sacct(tmp_path / "bin"))
        ended = cluster.submit("exit 3", "--job-name=of two words")
        cluster.wait_for(ended)
        go = cluster.directory / "go"
        running = cluster.submit(f"while [ ! -e {go} ]; do sleep 0.1; done; exit 5")
        cluster.wait_for(running, "RUNNING")
        cluster.stop_controller()
        with pytest.raises(ClusterError, match="Unable to contact slurm controller"):
            cluster.submit("true")
        written_down = cluster.run(accounting, *columns, "-j", str(ended), check=True).stdout
        assert written_down == f"{ended}|of two words|FAILED|3:0\n"
        cluster.start_controller()
        go.touch()
        assert cluster.wait_for(running)["ExitCode"] == "5:0"


@needs_slurm
def test_accounting_is_disabled_unless_it_is_put_on_the_path(cluster: Cluster) -> None:
    answer = cluster.run("sacct", "-n")
    assert answer.returncode == 1
    assert "accounting storage is disabled" in answer.stderr


@needs_slurm
def test_accounting_finds_jobs_by_number_and_by_name(cluster: Cluster, tmp_path: Path) -> None:
    command = str(cluster.write_sacct(tmp_path / "bin"))
    columns = ["-n", "-X", "-P", "-o", "JobIDRaw,JobName,State,ExitCode,Reason"]
    failed = cluster.submit("exit 3", "--job-name=of two words")
    running = cluster.submit("sleep 60", "--job-name=second")
    cluster.wait_for(failed)
    cluster.wait_for(running, "RUNNING")
    by_id = cluster.run(command, *columns, "-j", f"{failed},{running}", check=True).stdout
    assert by_id == f"{failed}|of two words|FAILED|3:0|NonZeroExitCode\n{running}|second|RUNNING|0:0|None\n"
    by_name = cluster.run(command, *columns, "--name=second", "-S", "now-1hour", check=True).stdout
    assert by_name == f"{running}|second|RUNNING|0:0|None\n"
    assert cluster.run(command, *columns, "--name=of two words", "-S", "now+1hour", check=True).stdout == ""
    assert cluster.run(command, *columns, "-j", "99999", check=True).stdout == ""
    assert 'Invalid field requested: "Colour"' in cluster.run(command, "-o", "Colour").stderr
    cluster.run("scancel", str(running), check=True)


@needs_slurm
@pytest.mark.slow
def test_accounting_remembers_what_the_controller_forgot(tmp_path: Path) -> None:
    with Cluster({"MinJobAge": "2"}) as cluster:
        job = cluster.submit("exit 3")
        cluster.wait_for(job)
        assert until(lambda: cluster.show(job) == {}, 60)
        answer = cluster.run(
            str(cluster.write_sacct(tmp_path)), "-n", "-X", "-P", "-o", "State,ExitCode", "-j", str(job)
        )
        assert answer.stdout == "FAILED|3:0\n"


@needs_slurm
def test_a_job_above_its_memory_is_killed() -> None:
    with Cluster(memory_limits=True) as cluster:
        job = cluster.submit(f"{sys.executable} -c 'x = bytearray(300 << 20); input()' < /dev/zero", "--mem=100M")
        assert cluster.wait_for(job)["JobState"] == "FAILED"
        assert "Exceeded job memory limit" in (cluster.directory / f"{job}.out").read_text()


@needs_slurm
@pytest.mark.slow
def test_a_time_limit_ends_a_job(cluster: Cluster) -> None:
    job = cluster.submit("sleep 300")
    cluster.wait_for(job, "RUNNING")
    cluster.expire(job)
    assert cluster.wait_for(job, timeout=60)["Reason"] == "TimeLimit"


@needs_slurm
def test_clusters_do_not_know_each_other_and_leave_nothing(cluster: Cluster) -> None:
    other = Cluster().start()
    directory = other.directory
    job = other.submit("setsid sleep 300 & sleep 300", "--job-name=elsewhere")
    other.wait_for(job, "RUNNING")
    assert "elsewhere" not in cluster.run("squeue").stdout
    mark = f"SLURM_CONF={other.configuration}"
    assert processes.members_of(directory, mark)
    other.stop()
    assert not directory.exists()
    assert not processes.members_of(directory, mark)
    other.stop()  # twice does no harm


@needs_slurm
def test_half_a_start_leaves_nothing_and_says_why() -> None:
    directories = []

    class Watched(Cluster):
        def stop(self) -> None:
            directories.append(self.directory)
            super().stop()

    with pytest.raises(ClusterError, match=r"slurmctld ended with status 1[^$]*select/nonsense"):
        Watched({"SelectType": "select/nonsense"}).start()
    (directory,) = directories
    assert not directory.exists()
    assert not processes.members_of(directory, f"SLURM_CONF={directory}/slurm.conf")


@needs_slurm
def test_a_killed_test_run_takes_its_cluster_along() -> None:
    program = "from support.slurm import Cluster; print(Cluster().start().directory, flush=True); input()"
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SUPPORT.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    directory = Path(run.stdout.readline().strip())
    assert processes.members_of(directory)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert until(lambda: not directory.exists())
    assert not processes.members_of(directory)


@needs_slurm
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_a_cluster() -> None:
    python, setpriv = shutil.which("python3", path="/usr/bin"), shutil.which("setpriv")
    if not python or not setpriv:
        pytest.skip("no setpriv, or no python3 that every user may run")
    program = """
        import json
        from support.slurm import Cluster
        with Cluster() as cluster:
            print(json.dumps(cluster.run("srun", "-N2", "-n2", "id", "-u").stdout.split()))
    """.replace("\n        ", "\n")
    directory = Path("/tmp") / f"ordinary-user-{os.getpid()}"  # pytest's own are closed to others
    shutil.copytree(SUPPORT, directory / "support", ignore=shutil.ignore_patterns("__pycache__"))
    try:
        (directory / "program.py").write_text(program)
        become = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
        answer = subprocess.run([*become, python, str(directory / "program.py")], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout) == ["65534", "65534"]
    finally:
        shutil.rmtree(directory)


def test_fields_of_a_job_whose_name_looks_like_fields() -> None:
    line = "JobId=7 JobName=a b=c JobState=COMPLETED UserId=me(5) JobState=FAILED TRES=cpu=1,node=1 ReqB:S:C:T=0:0:*:*"
    assert sacct.fields(line) == {
        "JobId": "7",
        "JobName": "a b=c JobState=COMPLETED",
        "UserId": "me(5)",
        "JobState": "FAILED",
        "TRES": "cpu=1,node=1",
        "ReqB:S:C:T": "0:0:*:*",
    }
    assert sacct.fields("") == {}


# sshd


@needs_sshd
def test_sessions_get_the_environment(sshd: Sshd) -> None:
    assert sshd.ssh('echo "$GREETING/$OTHER"').stdout == 'two  words "quoted" \\ /one\n'


@needs_sshd
def test_another_key_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)], check=True)
    config = sshd.client_config.read_text().replace(str(sshd.identity), str(stranger))
    (tmp_path / "config").write_text(config)
    line = ["ssh", "-F", str(tmp_path / "config"), f"{sshd.user}@{sshd.host}", "true"]
    answer = subprocess.run(line, capture_output=True, text=True)
    assert answer.returncode == 255
    assert "Permission denied" in answer.stderr


@needs_sshd
def test_a_cut_connection_ends_at_once_and_the_next_one_works(sshd: Sshd, tmp_path: Path) -> None:
    assert until(lambda: sshd.drop_connections() == 0)  # those of other tests have ended
    follow = f"echo started; while sleep 0.1; do date +%N > {tmp_path}/alive; done"
    line = ["ssh", "-F", str(sshd.client_config), f"{sshd.user}@{sshd.host}", follow]
    client = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "started\n"
    assert sshd.drop_connections() == 1
    _, error = client.communicate(timeout=20)
    assert client.returncode == 255
    assert "closed by remote host" in error
    before = (tmp_path / "alive").read_text() if (tmp_path / "alive").exists() else ""
    # a line that broke does not tell the command at the other end
    assert until(lambda: (tmp_path / "alive").exists() and (tmp_path / "alive").read_text() not in ("", before))
    assert sshd.ssh("echo again").stdout == "again\n"


@needs_sshd
def test_a_server_that_listens_no_more_refuses(sshd: Sshd) -> None:
    sshd.deafen()
    try:
        assert "Connection refused" in sshd.ssh("true").stderr
    finally:
        sshd.listen()
    assert sshd.ssh("echo back").stdout == "back\n"


@needs_sshd
def test_nothing_is_left_of_an_sshd() -> None:
    server = Sshd().start()
    directory, mark = server.directory, f"TEST_SSHD={server.directory}"
    server.ssh("setsid sleep 300 > /dev/null 2>&1 &")
    assert processes.members_of(directory / "nowhere", mark)
    server.stop()
    assert not directory.exists()
    assert not processes.members_of(directory, mark)


@needs_sshd
def test_nemo_run_reaches_it_by_tunnel_and_rsync(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tunnels = pytest.importorskip("nemo_run.core.tunnel.client")
    rsync = pytest.importorskip("nemo_run.core.tunnel.rsync").rsync
    monkeypatch.setenv("PATH", os.pathsep.join([str(sshd.write_ssh(tmp_path / "bin").parent), os.environ["PATH"]]))
    (tmp_path / "code").mkdir()
    (tmp_path / "code/file").write_text("travels")
    tunnel = tunnels.SSHTunnel(
        host=sshd.host, port=sshd.port, user=sshd.user, identity=str(sshd.identity), job_dir=str(tmp_path / "jobs")
    )
    try:
        assert tunnel.run("echo $OTHER").stdout == "one\n"
        rsync(tunnel.session, str(tmp_path / "code"), str(tmp_path / "there"))
    finally:
        tunnel.cleanup()
    assert (tmp_path / "there/code/file").read_text() == "travels"
