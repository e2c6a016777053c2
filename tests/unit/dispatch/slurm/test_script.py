"""The scripts of a Slurm job as text: whole-text goldens, and what bash makes of them.

STEPS_UPDATE_GOLDENS=1 writes the goldens anew; their diff is what has to be judged then.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steps.config.base import StepConfig
from steps.dispatch.executors.slurm import EXECUTOR, checks, layout, script
from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.job import JobSpec

GOLDENS = Path(__file__).parents[3] / "golden/slurm"
ID = "20260102-030405-peft-megatron_bridge-0a1b2c"


def spec(run_env: dict[str, Any] | None = None, /, **fields: Any) -> JobSpec:
    defaults = {
        "id": ID, "step": "peft/megatron_bridge", "module": "steps.peft.megatron_bridge.step",
        "directory": Path(".steps/jobs") / ID, "config": {}, "sources": {}, "config_name": "default",
        "profile": "cluster", "executor": "slurm", "base": Path("/home/ada/project"),
    }  # fmt: skip
    return JobSpec(**{**defaults, "environment": SlurmEnv.model_validate(run_env or {}), **fields})


HOST = spec({"tunnel": "local", "python": "/opt/python/bin/python3"})
CONTAINER = spec(
    {
        "tunnel": "ssh", "host": "login", "remote_job_dir": "/lustre/ada/jobs", "account": "llm", "partition": "batch",
        "batch_partition": "backfill", "time": "12:00:00", "gpus_per_node": 8, "exclusive": True,
        "mounts": ["/lustre/data:/data:ro"], "setup_lines": "module load cuda/12.4",
        "startup_commands": ["nvidia-smi -L"],
    },
    image="nvcr.io/nvidia/nemo:25.11", torchrun=True, nodes=2, nprocs=8,
    env={"NCCL_DEBUG": "INFO"}, secret_env={"HF_TOKEN": "hf_never_seen"},
)  # fmt: skip
EVERYTHING = spec(
    {
        "tunnel": "ssh", "host": "login", "user": "ada", "port": 2222, "identity": "~/.ssh/key",
        "remote_job_dir": "/lustre/ada lovelace/100%", "workspace": "/lustre/work", "python": "/opt/py 3/bin/python",
        "account": "llm", "partition": "p", "run_partition": "interactive", "batch_partition": "backfill",
        "time": "1-00:00:00", "qos": "high", "cpus_per_task": 16, "cpus_per_gpu": 2, "gpus_per_node": 4,
        "gpus_per_task": 4, "gres": "gpu:h100:4", "mem": 0, "mem_per_gpu": "80G", "mem_per_cpu": "4G",
        "exclusive": "user", "constraint": "h100&ib", "nodelist": "n[1-4]", "exclude": "n9", "reservation": "friday",
        "comment": """it's a "#comment" $(rm x) with \\ and é""", "signal": "B:USR1@60", "segment": 4,
        "network": "sharp", "dependency": "singleton", "job_name_prefix": "llm_core-",
        "additional_parameters": {"mail_type": "END,FAIL", "mail-user": "ada@example.com", "hold": True, "wckey": None},
        "srun_args": ["--cpu-bind=none", "--no-container-mount-home", "--label"],
        "setup_lines": ["module load 'cuda 12'", "ulimit -c 0"], "mounts": ["/a b:/c"],
        "container_mounts": ["/d:/e:ro", "/a b:/c"], "lustre_mount": "/lustre:/lustre", "container_env": ["PATH"],
        "squash_dir": "/lustre/images", "build_partition": "cpu", "build_include_gpus": False,
        "build_time": "00:30:00", "pip_extras": ["zstandard>=0.22", "wandb"], "startup_commands": ["echo 'one of us'"],
    },
    image="docker://nvcr.io/nvidia/nemo:25.11", torchrun=True, nodes=4, nprocs=4, attached=True, force_squash=True,
    env={"quoted": """a 'b' "c" $(rm x) \\ \nsecond line"""}, secret_env={"HF_TOKEN": "hf_never_seen"},
    passthrough=("--name", "with space"), debug=True,
)  # fmt: skip
CASES = {"host": HOST, "two_nodes": CONTAINER, "everything": EVERYTHING}
ALL = sorted((case, name) for case, one in CASES.items() for name in EXECUTOR.render(one))


@pytest.mark.parametrize(("case", "name"), ALL)
def test_golden(case, name):
    text = EXECUTOR.render(CASES[case])[name]
    golden = GOLDENS / f"{case}.{name}"
    if os.environ.get("STEPS_UPDATE_GOLDENS") == "1":
        golden.write_text(text)
    assert golden.exists(), f"{golden} is missing: STEPS_UPDATE_GOLDENS=1 pytest {Path(__file__).name}"
    assert text == golden.read_text()


def test_every_golden_is_rendered():
    assert sorted(path.name for path in GOLDENS.iterdir()) == [f"{case}.{name}" for case, name in ALL]


@pytest.mark.parametrize(("case", "name"), ALL)
def test_bash_reads_it(case, name):
    text = EXECUTOR.render(CASES[case])[name]
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_rendering_is_pure(tmp_path, monkeypatch):
    """The same text from anywhere, nothing written, no secret in it."""
    texts = EXECUTOR.render(CONTAINER)
    monkeypatch.chdir(tmp_path)
    assert EXECUTOR.render(CONTAINER) == texts
    assert not list(tmp_path.iterdir())
    assert "hf_never_seen" not in "".join(texts.values())


def lines(**env: Any) -> list[str]:
    return [line for line in EXECUTOR.render(spec(env))["sbatch.sh"].splitlines() if line.startswith("#SBATCH")]


def test_every_field_of_the_profile_is_read():
    """A field that neither a script nor a decision about the submission knows would be silently dropped."""
    elsewhere = {
        "executor", "container_image", "nodes", "nprocs_per_node", "ntasks_per_node", "env_vars",  # in the JobSpec
        "tunnel", "host", "user", "port", "identity",  # of the connection
        "build_gpus_per_node",  # has a test of its own
    }  # fmt: skip
    given = set(EVERYTHING.environment.model_fields_set)
    assert set(SlurmEnv.model_fields) - given <= elsewhere
    for name in given - elsewhere:
        without = EVERYTHING.environment.model_copy(
            update={name: SlurmEnv.model_fields[name].get_default(call_default_factory=True)}
        )
        changed = replace(EVERYTHING, environment=without, attached=name != "batch_partition")
        reference = replace(EVERYTHING, attached=name != "batch_partition")
        if name == "partition":
            changed, reference = (
                replace(one, environment=one.environment.model_copy(update={"run_partition": None}))
                for one in (changed, reference)
            )
        assert EXECUTOR.render(changed) != EXECUTOR.render(reference), name


@pytest.mark.parametrize(
    ("attached", "fields", "partition"),
    [
        (True, {"partition": "a", "run_partition": "b", "batch_partition": "c"}, "b"),
        (False, {"partition": "a", "run_partition": "b", "batch_partition": "c"}, "c"),
        (True, {"partition": "a", "batch_partition": "c"}, "a"),
        (False, {"partition": "a"}, "a"),
    ],
)
def test_partition(attached, fields, partition):
    assert f"#SBATCH --partition={partition}" in EXECUTOR.render(spec(fields, attached=attached))["sbatch.sh"]


def test_a_step_without_torchrun_runs_once():
    """nodes of a profile that a whole pipeline shares: packing data on each of them would be packing twice."""
    text = EXECUTOR.render(replace(HOST, nodes=4))["sbatch.sh"]
    assert "#SBATCH --nodes=1\n" in text
    assert "srun --nodes=1 --ntasks=1 " in text


def test_time_stays_text():
    assert "#SBATCH --time=12:00:00" in lines(time="12:00:00")
    assert "#SBATCH --time=30" in lines(time=30)


@pytest.mark.parametrize("value", ["a'b", "$(touch pwned)", "two\nlines", 'quo"te', "back\\slash", "`x`", "é", ""])
def test_environment_reaches_bash_as_it_is(value):
    text = EXECUTOR.render(spec(env={"odd": value}))["sbatch.sh"]
    start = text.index("export odd=")
    export = text[start : text.index("\n\npython=", start)]
    done = subprocess.run(["bash", "-c", f'{export}\nprintf %s "$odd"'], capture_output=True, text=True, check=True)
    assert done.stdout == value


def test_the_port_is_free_and_the_address_found(tmp_path):
    """The lines of the script, with a Slurm that names a node without an address of its own."""
    text = EXECUTOR.render(CONTAINER)["sbatch.sh"]
    part = text[text.index("MASTER_ADDR=$(") : text.index("export MASTER_ADDR")]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$2" = hostnames ] && echo no-such-node || echo "   NodeAddr=10.0.0.7 NodeHostName=x"\n'
    )
    scontrol.chmod(0o755)
    taken = tmp_path / "tcp"
    taken.write_text("".join(f" 0: 0100007F:{port:04X} 00000000:0000 0A\n" for port in (20000, 20001, 20003)))
    part = part.replace("/proc/net/tcp /proc/net/tcp6", shlex.quote(str(taken))).replace("% 12000", "% 4")
    done = subprocess.run(
        ["bash", "-c", f'{part}\necho "$MASTER_ADDR:$MASTER_PORT"'],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "no-such-node"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "10.0.0.7:20002\n"


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("nvcr.io#nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("localhost:5000/mine", "localhost:5000#mine"),
        ("localhost/mine", "localhost#mine"),
        ("nvidia/cuda:12.4", "nvidia/cuda:12.4"),
        ("ubuntu", "ubuntu"),
        ("docker://nvcr.io/nvidia/nemo", "nvcr.io#nvidia/nemo"),
        ("dockerd://mine", "dockerd://mine"),
        ("/lustre/images/nemo.sqsh", "/lustre/images/nemo.sqsh"),
        ("./nemo.sqsh", "./nemo.sqsh"),
    ],
)
def test_image_names(image, reference):
    assert layout.reference(image) == reference


def test_an_image_file_is_not_imported():
    assert "squash.sh" not in EXECUTOR.render(spec(image="/lustre/images/nemo.sqsh"))
    assert "squash.sh" in EXECUTOR.render(spec(image="ubuntu"))


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        ({"gpus_per_node": 4}, "4"),
        ({"gpus_per_node": 4, "build_gpus_per_node": 1}, "1"),
        ({"gpus_per_node": 4, "build_gpus_per_node": 0}, None),
        ({"gpus_per_node": 4, "build_include_gpus": False}, None),
        ({}, None),
    ],
)
def test_gpus_of_the_import(fields, gpus):
    text = EXECUTOR.render(spec(fields, image="ubuntu"))["squash.sh"]
    assert [line for line in text.splitlines() if "gpus" in line] == (
        [f"#SBATCH --gpus-per-node={gpus}"] if gpus else []
    )


def test_images_have_files_of_their_own():
    names = [
        "nvcr.io/nvidia/nemo:1",
        "nvcr.io/nvidia/nemo:2",
        "nvcr.io/nvidia_nemo:1",
        "nvidia/nemo:1",
        "nvidia_nemo:1",
    ]
    assert len({layout.squash_file(spec(image=name)) for name in names}) == len(names)


GOOD = {"tunnel": "ssh", "host": "login", "remote_job_dir": "/jobs"}


@pytest.mark.parametrize(
    ("fields", "where", "words"),
    [
        ({"host": None}, "run.env.host", "tunnel ssh needs it"),
        ({"remote_job_dir": None}, "run.env.remote_job_dir", "tunnel ssh needs it"),
        ({"remote_job_dir": "jobs"}, "run.env.remote_job_dir", "no absolute path"),
        ({"remote_job_dir": "~/jobs"}, "run.env.remote_job_dir", "no absolute path"),
        ({"workspace": "here"}, "run.env.workspace", "no absolute path"),
        ({"remote_job_dir": "/a:b"}, "run.env.remote_job_dir", "colon"),
        ({"mounts": ["/data"]}, "run.env.mounts", "'/data' is no mount"),
        ({"lustre_mount": "/a:/b:ro:x"}, "run.env.mounts", "is no mount"),
        ({"container_mounts": ["/a:/b,/c:/d"]}, "run.env.mounts", "is no mount"),
        ({"container_env": ["A B"]}, "run.env.container_env", "no name"),
        ({"comment": "two\nlines"}, "run.env.comment", "line break"),
        ({"job_name_prefix": "x\ny"}, "run.env.job_name_prefix", "line break"),
        ({"additional_parameters": {"mail-user": "a\n#SBATCH --x"}}, "run.env.additional_parameters", "line break"),
        ({"additional_parameters": {"output": "x"}}, "run.env.additional_parameters.output", "decided by the job"),
        ({"additional_parameters": {"job_name": "x"}}, "run.env.additional_parameters.job_name", "decided by the job"),
        ({"additional_parameters": {"x y": 1}}, "run.env.additional_parameters.x y", "no name of an sbatch option"),
    ],
)
def test_check(fields, where, words):
    problems = list(EXECUTOR.check(StepConfig(), SlurmEnv.model_validate({**GOOD, **fields})))
    assert [problem.where for problem in problems] == [where]
    assert words in problems[0].what


def test_what_is_fine_is_fine():
    fields = {"setup_lines": "a\nb", "startup_commands": ["if x\nthen y\nfi"], "env_vars": {"A": "x\ny"}}
    assert not list(checks.check(SlurmEnv.model_validate({**GOOD, **fields})))
    assert not list(checks.check(SlurmEnv.model_validate({"tunnel": "local"})))
    for one in CASES.values():
        assert not list(checks.check(one.environment.model_copy(update={"identity": None})))


def test_a_key_that_is_not_here(tmp_path):
    env = SlurmEnv.model_validate({**GOOD, "tunnel": "ssh", "host": "h", "identity": str(tmp_path / "key")})
    assert [(problem.where, problem.what) for problem in checks.check(env)] == [
        ("run.env.identity", f"there is no file {tmp_path}/key")
    ]
    (tmp_path / "key").touch()
    assert not list(checks.check(env))


def test_reserved_options_are_those_we_write():
    """What the script decides cannot be decided twice."""
    ours = {
        line.split("--")[1].split("=")[0]
        for line in EXECUTOR.render(HOST)["sbatch.sh"].splitlines()
        if "#SBATCH" in line
    }
    assert ours <= script.RESERVED
