"""An env.toml written for the project this one is modeled on works here: same tables, same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps.dispatch import catalog, profiles
from steps.dispatch.plan import Place, prepare
from steps.dispatch.profiles import env_files
from steps.errors import ExecutorError

# The field names, types and interpolations of the files that its env/env_toml step generates and its manual shows.
THEIRS = """
[wandb]
project = "p"
entity = "${oc.env:WANDB_ENTITY,e}"
[artifacts]
backend = "file"
root = "/artifacts"
[cache]
git_dir = "/cache"
[cli]
theme = "light"

[slurm_base]
executor = "slurm"
tunnel = "ssh"
host = "${oc.env:SLURM_HOST,login.site.org}"
user = "${oc.env:USER}"
account = "${oc.env:SLURM_ACCOUNT,team}"
partition = "${oc.env:SLURM_PARTITION,gpu}"
container_image = "registry/image:1"
remote_job_dir = "${oc.env:NEMO_RUN_DIR,/scratch/${oc.env:USER}/run}"
mounts = ["/scratch:/scratch"]
lustre_mount = ""
nodes = 1
ntasks_per_node = 4
gpus_per_node = 4
time = "01:30:00"
[slurm_base.env_vars]
HF_TOKEN = "${oc.env:HF_TOKEN,''}"
HF_HOME = "${oc.env:HF_HOME,/scratch/${oc.env:USER}/hf}"
WANDB_API_KEY = "${oc.env:WANDB_API_KEY,''}"
PYTHONPATH = "/nemo_run/code/src"
RAY_DEDUP_LOGS = "0"

[slurm_prep_base]
extends = "slurm_base"
partition = "${oc.env:SLURM_CPU_PARTITION,cpu}"
build_partition = "${oc.env:SLURM_CPU_PARTITION,cpu}"
build_include_gpus = false
build_gpus_per_node = 0
ntasks_per_node = 1
cpus_per_task = 2
gpus_per_node = 0
startup_commands = ["pip install x"]

[slurm_sft]
extends = "slurm_base"
nodes = 2
[slurm_sft.env_vars]
SFT_PACKED_DIR = "/scratch/${oc.env:USER}/packed/splits/train/*.parquet"

[slurm_peft_megatron_bridge]
extends = "slurm_sft"
[slurm_peft_megatron_bridge.env_vars]
SFT_OUTPUT_DIR = "/scratch/${oc.env:USER}/out"

[gpu_partition]
extends = "slurm_prep_base"
partition = "${oc.env:SLURM_GPU_PARTITION,${oc.env:SLURM_PARTITION,gpu}}"

[my-cluster]
executor = "slurm"
account = "a"
run_partition = "interactive"
batch_partition = "backfill"
identity = "~/.ssh/id_rsa"
nemo_run_dir = "/scratch/run"
container = "/images/x.sqsh"
mem = "0"
exclusive = true
dependency = "afterok:1"

[laptop]
executor = "local"
nproc_per_node = 2

[lepton_base]
executor = "lepton"
container_image = "registry/image:1"
node_group = "group"
node_reservation = "r"
resource_shape = "${oc.env:LEPTON_GPU_SHAPE,gpu.8xa100-80gb}"
nemo_run_dir = "${oc.env:NEMO_RUN_DIR,/mnt/s/run}"
remote_job_dir = "${oc.env:NEMOTRON_REMOTE_JOB_DIR,/mnt/s/output}"
workspace = "${oc.env:NEMOTRON_WORKSPACE,/mnt/s}"
ray_version = "2.0.0"
nodes = 1
gpus_per_node = 8
nprocs_per_node = 8
shared_memory_size = 65536
pip_extras = ["a", "b"]
can_be_preempted = true
can_preempt = false
queue_priority = "mid-4000"
image_pull_secrets = ["pull"]
head_resource_shape = "cpu.small"
pre_launch_commands = ["true"]
mounts = [{ path = "${oc.env:NEMOTRON_HOST_MOUNT,/}", mount_path = "/mnt/s", from = "${oc.env:FROM,node-nfs:s}" }]
[lepton_base.env_vars]
RAY_GRAFANA_IFRAME_HOST = ""
[lepton_base.secret_vars]
HF_TOKEN = "hf-token"

[lepton_prep]
extends = "lepton_base"
resource_shape = "cpu.medium"
gpus_per_node = 0
nprocs_per_node = 1

[with_run_command]
extends = "slurm_base"
run_command = "python -m x --config {config}"
"""


@pytest.fixture(autouse=True)
def _their_file(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "theirs.toml").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    for name in ("NEMO_RUN_DIR", "SLURM_HOST", "SLURM_PARTITION", "HF_TOKEN", "STEPS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEMOTRON_ENV_FILE", "theirs.toml")
    monkeypatch.setenv("USER", "me")


def own() -> list[str]:
    tables = env_files.tables()
    return [name for name in profiles.names(tables) if name in tables.own]


def test_every_profile_loads_but_for_what_has_no_meaning_here():
    found = {name: profiles.load(name) for name in own() if name != "with_run_command"}
    assert len(found) == 9
    assert {"wandb", "artifacts", "cache", "cli"}.isdisjoint(found)
    with pytest.raises(ExecutorError) as caught:
        profiles.load("with_run_command")
    [problem] = caught.value.problems
    assert (problem.where, problem.what) == ("run_command", "has no meaning here")
    assert "startup_commands" in problem.hint


@pytest.mark.parametrize("name", ["wandb", "artifacts", "cache", "cli"])
def test_their_other_tables_are_no_profiles(name):
    with pytest.raises(ExecutorError, match=rf"theirs.toml \[{name}\]: is no profile: it names no executor"):
        profiles.load(name)


def test_a_training_profile_of_theirs_runs_our_step():
    spec = prepare(
        catalog.find("peft/megatron_bridge"), "default", place=Place("slurm_peft_megatron_bridge", attached=False)
    ).spec
    assert (spec.nodes, spec.nprocs, spec.image) == (2, 4, "registry/image:1")
    assert spec.environment.remote_job_dir == "/scratch/me/run"
    assert spec.environment.partition == "gpu"
    assert {**spec.env, **spec.secret_env}["SFT_OUTPUT_DIR"] == "/scratch/me/out"


def test_their_older_words_mean_ours():
    cluster = profiles.load("my-cluster")
    assert cluster.env["container_image"] == "/images/x.sqsh"
    assert cluster.env["remote_job_dir"] == "/scratch/run"
    assert cluster.sources["remote_job_dir"] == "theirs.toml [my-cluster]"
    assert profiles.load("laptop").env["nprocs_per_node"] == 2
    assert profiles.load("lepton_base").env["nemo_run_dir"] == "${oc.env:NEMO_RUN_DIR,/mnt/s/run}"  # a word of Lepton's


def test_two_words_for_one_thing_are_not_guessed_about():
    Path("theirs.toml").write_text('[p]\nexecutor = "slurm"\nnemo_run_dir = "/a"\nremote_job_dir = "/b"\n')
    with pytest.raises(ExecutorError, match="nemo_run_dir: unknown key"):
        profiles.load("p")
