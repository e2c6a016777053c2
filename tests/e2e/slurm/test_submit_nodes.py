"""Several nodes: torchrun on each, one gloo group over all, what happens when one is lost, and images in containers."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest
from support.packed import config, random_rows, write_base, write_packed
from support.slurm_site import DEMO, Site, Submitted

from steps.config import yaml12

pytest.importorskip("nemo_run", reason="nemo_run is not installed (pip install 'peft-steps[cluster]')")

TWO_NODES = "nodes = 2\nnprocs_per_node = 1\nenv_vars = {OMP_NUM_THREADS = 1, GLOO_SOCKET_IFNAME = 'lo'}"


@pytest.fixture
def site(tmp_path, cluster) -> Site:
    directory = tmp_path / "a site"
    directory.mkdir()
    return Site(directory, cluster)


def training(site: Site, name: str, **sections) -> str:
    """A configuration of peft/megatron_bridge over tiny data."""
    if not (site.directory / "base").exists():
        write_base(site.directory / "base")
        write_packed(site.directory / "packed", random_rows(20), random_rows(6, seed=9))
    checkpoint = {"save": str(site.directory / name), **sections.pop("checkpoint", {})}
    (site.directory / f"{name}.yaml").write_text(yaml12.dump(config(site.directory, checkpoint=checkpoint, **sections)))
    return f"./{name}.yaml"


def losses(job: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["iteration"], row["loss"]) for row in rows if "loss" in row]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_two_nodes_train_as_one_process_does(site):
    """The gradients meet in a gloo all-reduce over both nodes: the same curve as one process gives on this machine.

    Each process computes half of a batch: without the sum over both the curve would be another one, and two processes
    that do not know each other would both write it.
    """
    site.profile(TWO_NODES + "\nstartup_commands = ['echo node $SLURM_NODEID of $SLURM_NNODES']")
    job = site.submit("peft/megatron_bridge", "-c", training(site, "two"))
    job.succeed(timeout=120)
    assert {"node 0 of 2", "node 1 of 2"} <= set(job.log.splitlines())
    alone = site.steps("run", "peft/megatron_bridge", "-c", training(site, "one"), env={"OMP_NUM_THREADS": "1"})
    assert alone.returncode == 0, alone.stderr
    (local,) = set(site.jobs()) - {job.directory}
    expected, found = losses(local), losses(job.there)
    assert found.keys() == expected.keys()
    assert len(found) >= 10
    assert all(math.isclose(found[key], expected[key], rel_tol=1e-5) for key in found)


def wait_for_training(job: Submitted) -> None:
    deadline = time.monotonic() + 90
    while not (job.there / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, job.log
        time.sleep(0.1)


def test_a_lost_node_ends_the_job(site):
    """The power of one node goes: the job does not hang on the other, and Slurm's verdict is there."""
    site.profile(TWO_NODES)
    job = site.submit(
        "peft/megatron_bridge", "-c", training(site, "long", train={"train_iters": 100000, "eval_interval": 1000})
    )
    wait_for_training(job)
    try:
        site.cluster.kill_node("n2")
        shown = job.end(timeout=60)
        assert shown["JobState"] == "NODE_FAIL"
    finally:
        site.cluster.start_node("n2")


def test_a_process_that_dies_ends_the_job(site):
    """One of two processes is killed: the other does not wait for it for ever, and the failure has a reason."""
    site.profile(TWO_NODES.replace("env_vars", "startup_commands = ['[ \"$SLURM_NODEID\" = 0 ] || exit 7']\nenv_vars"))
    job = site.submit("peft/megatron_bridge", "-c", training(site, "dead"))
    started = time.monotonic()
    shown = job.end(timeout=120)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "7:0"), job.log
    assert time.monotonic() - started < 60


# Containers. There is no pyxis here: an srun that takes its options for what they are stands in front of the real one,
# and the image is never entered. What is tested is which options srun is given, and when an image is imported.

_SRUN = """#!/bin/bash
[ "$1" = --help ] && echo "      --container-image=IMAGE   [pyxis] the image" && exit
kept=()
for argument; do
    case $argument in --container-*) echo "srun was given $argument";; *) kept+=("$argument");; esac
done
exec {srun} "${{kept[@]}}"
"""
_ENROOT = """#!/bin/bash
[ "$1 $2" = "import --output" ] || exit 9
[ ! -e {broken} ] || {{ echo "[ERROR] no such image" >&2; exit 1; }}
echo "enroot was asked for $4"
echo "imported by job $SLURM_JOB_ID" > "$3"
"""


@pytest.fixture
def pyxis(site, tmp_path) -> Path:
    """Directory of the stand-ins, which is in front of everybody's PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (
        ("srun", _SRUN.format(srun=shutil.which("srun"))),
        ("enroot", _ENROOT.format(broken=tools / "broken")),
        ("python", f'#!/bin/sh\nexec {shutil.which("python")} "$@"\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    site.env["PATH"] = f"{tools}:{site.cluster.env['PATH']}"
    site.profile(
        f'container_image = "nvcr.io/nvidia/nemo:25.11"\nmounts = ["/data:/data:ro"]\nsquash_dir = "{tmp_path}/images"'
    )
    return tools


@pytest.mark.slow
def test_an_image_is_imported_once(site, pyxis, tmp_path):
    file = tmp_path / "images/nvcr.io+nvidia+nemo=25.11.sqsh"
    first = site.submit(*DEMO)
    first.succeed()
    imported = int(first.status["handle"]["image_job_id"])
    assert site.cluster.show(imported)["JobName"] == f"{first.directory.name}-image"
    assert site.cluster.show(imported)["EndTime"] <= site.cluster.show(first.number)["StartTime"]
    assert "enroot was asked for docker://nvcr.io#nvidia/nemo:25.11\n" in first.log
    assert f"srun was given --container-image={file}\n" in first.log
    assert f"srun was given --container-mounts=/data:/data:ro,{site.directory}:{site.directory}\n" in first.log
    assert f"srun was given --container-workdir={first.there}/work\n" in first.log
    assert file.read_text() == f"imported by job {imported}\n"

    second = site.submit(*DEMO, "output_dir=second")
    second.succeed()
    assert "image_job_id" not in second.status["handle"]
    assert f"srun was given --container-image={file}\n" in second.log

    third = site.submit(*DEMO, "output_dir=third", "--force-squash")
    third.succeed()
    assert file.read_text() == f"imported by job {third.status['handle']['image_job_id']}\n"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.slow
def test_an_image_that_cannot_be_imported(site, pyxis, tmp_path):
    (pyxis / "broken").touch()
    job = site.submit(*DEMO)
    assert job.end()["JobState"] == "CANCELLED"
    assert "[ERROR] no such image" in job.log
    assert not list((tmp_path / "images").iterdir())


@pytest.mark.slow
def test_without_enroot_the_name_is_used(site, pyxis):
    (pyxis / "enroot").unlink()
    job = site.submit(*DEMO)
    job.succeed()
    assert "note: no enroot on " in job.log
    assert "srun was given --container-image=nvcr.io#nvidia/nemo:25.11\n" in job.log


def test_without_pyxis_the_host_is_used(site, pyxis):
    (pyxis / "srun").unlink()
    job = site.submit(*DEMO)
    job.succeed()
    assert job.log.startswith("note: this Slurm has no pyxis: ")
    assert "image_job_id" not in job.status["handle"]
