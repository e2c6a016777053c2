"""A profile of one's own on top of shipped ones runs a step on a real Slurm; `profiles check` asks that Slurm."""

from __future__ import annotations

import json

import pytest
from support.steps import steps

OWN = """
[slurm_base]
extends = "slurm_defaults"
tunnel = "local"
partition = "batch"
container_image = ""
[mine]
extends = "slurm_prep_demo_chat"
cpus_per_task = 1
time = 00:05:00
[elsewhere]
extends = "mine"
partition = "nights"
[in_a_container]
extends = "mine"
container_image = "nvcr.io/nvidia/nemo:25.11"
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "env.toml").write_text(OWN)
    return tmp_path


def test_a_step_runs_with_a_profile_that_stands_on_shipped_ones(cluster, project):
    env = {**cluster.env, "STEPS_ENV_FILE": "", "OMP_NUM_THREADS": "1"}
    done = steps("run", "data_prep/demo_chat", "-c", "tiny", "-r", "mine", cwd=project, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    [job] = (project / ".steps" / "jobs").iterdir()
    facts = cluster.show(int((job / "slurm_job_id").read_text()))
    assert (facts["Partition"], facts["TimeLimit"], facts["NumCPUs"]) == ("batch", "00:05:00", "1")
    assert json.loads((project / "output/tiny/chat/artifact.json").read_text())["type"] == "raw_jsonl"


def test_check_asks_the_cluster(cluster, project):
    env = {**cluster.env, "STEPS_ENV_FILE": ""}
    ready = steps("profiles", "check", "mine", cwd=project, env=env)
    assert (ready.returncode, ready.stdout, ready.stderr) == (0, "mine is ready\n", "")
    wrong = steps("profiles", "check", "elsewhere", cwd=project, env=env)
    assert (wrong.returncode, wrong.stdout) == (5, "")
    [line] = wrong.stderr.splitlines()
    assert line.startswith("error: run.env.partition: ")
    assert "(from env.toml [elsewhere])" in line
    # Without pyxis the job runs in the host environment, which has what it needs: worth a note.
    noted = steps("profiles", "check", "in_a_container", cwd=project, env=env)
    assert (noted.returncode, noted.stderr) == (0, "")
    note, verdict = noted.stdout.splitlines()
    assert note.startswith("note: run.env.container_image: srun knows no --container-image (pyxis is not installed)")
    assert "(from env.toml [in_a_container])" in note
    assert verdict == "in_a_container is ready"
