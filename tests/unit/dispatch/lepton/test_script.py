"""The launch script and the job request, whole."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.golden import assert_golden

from steps.dispatch import executors
from steps.dispatch.executors.lepton import script
from steps.dispatch.executors.lepton.env import LeptonEnv
from steps.dispatch.job import JobSpec
from steps.errors import ExecutorError

ID = "20260102-030405-peft-megatron_bridge-0a1b2c"
SITE = {
    "executor": "lepton",
    "node_group": "my-group",
    "resource_shape": "gpu.8xh100-sxm",
    "nemo_run_dir": "/mnt/shared/nemo run",
    "mounts": [{"path": "/", "mount_path": "/mnt/shared", "from": "node-nfs:shared"}],
}


def spec(profile: dict | None = None, /, **given) -> JobSpec:
    fields = {
        "id": ID, "step": "peft/megatron_bridge", "module": "steps.peft.megatron_bridge.step",
        "directory": Path(".steps/jobs") / ID, "config": {}, "sources": {}, "config_name": "default",
        "profile": "lepton", "executor": "lepton", "image": "nvcr.io/nvidia/nemo:25.11",
    }  # fmt: skip
    return JobSpec(**{**fields, "environment": LeptonEnv.model_validate({**SITE, **(profile or {})}), **given})


ODD = """a b "c" 'd' $(touch pwned) `touch pwned` $HOME back\\slash
second line"""

CASES = {
    "one-process": spec(step="data_prep/demo_chat", module="steps.data_prep.demo_chat.step"),
    "one-node": spec(
        {
            "secret_vars": {"WANDB_API_KEY": "team-wandb"},
            "pip_extras": ["zstandard>=0.22", "a package"],
            "startup_commands": ["nvidia-smi"],
            "image_pull_secrets": ["ngc"],
            "python": "/opt/venv/bin/python",
        },
        torchrun=True, nprocs=8, debug=True, passthrough=("--odd", "a b"),
        env={"NCCL_DEBUG": "WARN"}, secret_env={"HF_TOKEN": "hf_never_written"},
    ),
    "two-nodes": spec(
        {
            "node_reservation": "res-1",
            "can_be_preempted": True,
            "queue_priority": "low-1000",
            "shared_memory_size": 1024,
            "pre_launch_commands": ["ulimit -l unlimited"],
            "custom_spec": {"user_security_context": {"run_as_user": 1000}, "max_failure_retry": 1},
        },
        torchrun=True, nodes=2, nprocs=8, env={"ODD": ODD, "EMPTY": ""},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_texts(case):
    files = executors.get("lepton").render(CASES[case])
    assert list(files) == ["launch_script.sh", "lepton.json"]
    assert_golden(f"lepton/{case}.sh", files["launch_script.sh"])
    assert_golden(f"lepton/{case}.json", files["lepton.json"])
    assert "hf_never_written" not in "".join(files.values())


def test_every_golden_belongs_to_a_case():
    folder = Path(__file__).parents[3] / "golden/lepton"
    assert {path.stem for path in folder.iterdir()} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_shell_can_read_the_script(case):
    text = script.launch_script(CASES[case])
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_job_without_an_image_is_refused():
    with pytest.raises(ExecutorError, match="run.env.container_image: is missing, and a Lepton job needs one"):
        script.render(spec(image=""))


@given(
    step=st.from_regex(r"[a-z][a-z0-9_]{0,40}-[a-z][a-z0-9_]{0,40}", fullmatch=True),
    moment=st.from_regex(r"[0-9]{8}-[0-9]{6}", fullmatch=True),
    random=st.from_regex(r"[0-9a-f]{6}", fullmatch=True),
)
def test_names_are_those_that_lepton_takes(step, moment, random):
    """Lower case letters, digits and '-', at most 36 characters, beginning with a letter; all of the random part."""
    for word in ("", "move", "env"):
        name = script.name(f"{moment}-{step}-{random}", word)
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,34}[a-z0-9])?", name)
        assert name.endswith(moment[2:].replace("-", "") + "-" + random)


def test_a_name_tells_the_step_and_follows_from_the_id():
    assert script.name(ID) == "megatron-bridge-260102030405-0a1b2c"
    assert script.name(ID, "move") == "move-260102030405-0a1b2c"
    assert script.name("some other id") != script.name("another id")


def test_custom_spec_adds_and_replaces():
    made = script.request(spec({"custom_spec": {"container": {"ports": []}, "shared_memory_size": 7}}))["spec"]
    assert made["container"]["image"] == "nvcr.io/nvidia/nemo:25.11"
    assert made["container"]["ports"] == []
    assert made["shared_memory_size"] == 7


def test_the_request_is_json_in_plain_letters():
    text = script.render(spec(env={"NAME": "Żółć"}))["lepton.json"]
    assert "Żółć" in text
    assert json.loads(text)["spec"]["envs"] == [{"name": "NAME", "value": "Żółć"}]
