"""What `profiles check` finds missing on a real Slurm: each thing by its name, and nothing where nothing is wrong."""

from __future__ import annotations

import re
import sys

import pytest
from support.slurm import Cluster
from support.slurm_jobs import login_to

from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.probe import Partition, minutes, partition_problems, probe, read_partitions


def found(place, **fields) -> list[tuple[str, str]]:
    """(field, whole message) of each problem. The job's Python is this one: it has what steps need."""
    env = SlurmEnv.model_validate({"executor": "slurm", "python": sys.executable, **place.env, **fields})
    return [(problem.where.removeprefix("run.env."), str(problem)) for problem in probe(env)]


def test_nothing_is_missing(place):
    pytest.importorskip("nemo_run")
    assert found(place) == []
    assert found(place, partition="debug", nodes=2, gpus_per_node=2, time="1-00:00:00", cpus_per_task=2) == []
    assert not place.there.exists(), "asking leaves nothing behind"


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        ({"partition": "bacth"}, "partition", r"no partition 'bacth'.*batch, debug.*Did you mean batch\?"),
        ({"batch_partition": "gpu"}, "batch_partition", "no partition 'gpu'"),
        ({"nodes": 5}, "nodes", "'batch' has no 5 nodes for a job.*at most 2"),
        ({"gpus_per_node": 4}, "gpus_per_node", "no node of 'batch' has 4 GPUs.*at most 2"),
        ({"python": "/no/such/python"}, "python", "/no/such/python on .*: not found"),
        ({"python": "/usr/bin/env"}, "python", "/usr/bin/env on .*: is no Python"),
        ({"remote_job_dir": "/dev/null/jobs"}, "remote_job_dir", "/dev/null is no directory"),
        ({"container_image": "nvcr.io/nvidia/nemo:25.09"}, "container_image", "pyxis is not installed"),
        ({"container_image": "/no/such.sqsh"}, "container_image", r"there is no file /no/such\.sqsh"),
        ({"constraint": "h100"}, None, "Slurm would not take a job like this: .*Invalid feature specification"),
        ({"mem": "64G"}, None, "Requested node configuration is not available.*Ask for what its nodes have"),
    ],
)
def test_each_thing_that_is_missing(login, fields, where, message):
    problems = found(login, **fields)
    assert any(key == (where or "") and re.search(message, text) for key, text in problems), problems


def test_everything_at_once(login):
    wheres = [where for where, _ in found(login, partition="x", python="/no", remote_job_dir="/dev/null/x", host="y")]
    assert wheres == ["remote_job_dir", "python", "partition"]


def test_a_partition_that_is_closed(login):
    login.cluster.run("scontrol", "update", "PartitionName=debug", "State=DOWN", check=True)
    try:
        assert any("'debug' is closed" in message for _, message in found(login, partition="debug"))
    finally:
        login.cluster.run("scontrol", "update", "PartitionName=debug", "State=UP", check=True)


def test_a_time_limit(tmp_path, monkeypatch):
    if lack := Cluster.missing():
        pytest.skip(lack)
    with Cluster() as cluster:
        place = login_to(cluster, tmp_path, monkeypatch)
        cluster.run("scontrol", "update", "PartitionName=batch", "MaxTime=4:00:00", check=True)
        assert dict(found(place, time="12:00:00"))["time"].endswith("Allowed: at most 240 minutes")
        assert not dict(found(place, time="4:00:00")).get("time")
        cluster.stop_controller()
        (problem,) = [message for where, message in found(place) if not where]
        assert "controller does not answer" in problem


def test_accounts_where_there_is_accounting(login, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sacctmgr").write_text("#!/bin/sh\nprintf 'llm_general\\nllm_post\\n'\n")
    (tmp_path / "bin/sacctmgr").chmod(0o755)
    assert not any(where == "account" for where, _ in found(login, account="llm_pots")), "nobody can tell"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert "Did you mean llm_post?" in dict(found(login, account="llm_pots"))["account"]
    assert not any(where == "account" for where, _ in found(login, account="llm_post"))


def test_a_machine_without_slurm_and_a_host_out_of_reach(tmp_path, monkeypatch, login):
    programs = ("bash", "sh", "id", "head", "dirname", "df", "awk", "grep", "tail")
    (tmp_path / "bin").mkdir()
    for program in programs:
        (tmp_path / "bin" / program).symlink_to(f"/usr/bin/{program}")
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tmp_path / "bin"))
        messages = [message for _, message in found(login)]
    assert any("has no sbatch, srun, squeue, scancel, scontrol, sinfo on its PATH" in message for message in messages)
    (message,) = [text for _, text in found(login, tunnel="ssh", host="127.0.0.1", port=1) if "reached" in text]
    assert "127.0.0.1 cannot be reached" in message


def test_sinfo_of_a_cluster_with_gpus():
    partitions = read_partitions(
        "batch*|up|4:00:00|12|1-8|gpu:h100:8(S:0-1)\nbatch*|up|4:00:00|2|1-8|gpu:a100:4,gpu:l40:2\n"
        "cpu|up|infinite|3|1-infinite|(null)\nold|inact|1-00:00:00|1|1-infinite|gpu:4\n"
    )
    assert partitions == {
        "batch": Partition(True, True, 240.0, 14, 8, 8),
        "cpu": Partition(True, False, None, 3, None, 0),
        "old": Partition(False, False, 1440.0, 1, None, 4),
    }
    env = SlurmEnv(run_partition="cpu,old", batch_partition="batch", nodes=9, gpus_per_node=4, time="8:00:00")
    assert [(problem.where, problem.what) for problem in partition_problems(env, partitions)] == [
        ("run.env.nodes", "'cpu' has no 9 nodes for a job"),
        ("run.env.gpus_per_node", "no node of 'cpu' has 4 GPUs"),
        ("run.env.run_partition", "the partition 'old' is closed"),
        ("run.env.nodes", "'old' has no 9 nodes for a job"),
        ("run.env.nodes", "'batch' has no 9 nodes for a job"),
        ("run.env.time", "8:00:00 is longer than jobs in 'batch' may take"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30), ("30:30", 30.5), ("12:00:00", 720), ("1-0", 1440), ("1-2", 1560), ("1-02:30", 1590),
        ("2-00:00:30", 2880.5), ("infinite", None), ("UNLIMITED", None), ("n/a", None),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_writes_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("absent", ["nemo_run", "paramiko"])
def test_without_nemo_run(login, monkeypatch, absent):
    """The whole program: what is imported here already would hide that it cannot be."""
    import subprocess

    program = f"""
import sys
sys.modules[{absent!r}] = None
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.probe import probe
print([str(problem) for problem in probe(SlurmEnv(executor="slurm", remote_job_dir={str(login.there)!r}))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "NeMo-Run" in done.stdout
    assert "pip install 'peft-steps[cluster]'" in done.stdout
