"""The Lepton of the tests, asked by the client that users have: what it promises of jobs, logs, secrets and faults."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lepton import NODE_GROUP, NODE_GROUP_ID, Lepton
from support.lepton_jobs import names_resolve

pytest.importorskip("leptonai", reason="the client of DGX Cloud Lepton is not installed")

FINISHED = ("Completed", "Failed", "Stopped", "Deleted", "Archived")


@pytest.fixture
def lepton() -> Iterator[Lepton]:
    with Lepton(grace=0.5) as running:
        yield running


@pytest.fixture
def client(lepton: Lepton, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in lepton.env.items():
        monkeypatch.setenv(name, value)
    from leptonai.api.v2.client import APIClient

    return APIClient()


def submit(client: Any, command: list[str], name: str = "a-job", **spec: Any) -> Any:
    from leptonai.api.v1.types.affinity import LeptonResourceAffinity
    from leptonai.api.v1.types.common import Metadata
    from leptonai.api.v1.types.deployment import LeptonContainer
    from leptonai.api.v1.types.job import LeptonJob, LeptonJobUserSpec

    job = LeptonJobUserSpec(
        resource_shape=spec.pop("resource_shape", "cpu.small"),
        affinity=LeptonResourceAffinity(allowed_dedicated_node_groups=[NODE_GROUP_ID]),
        container=LeptonContainer(image="busybox", command=command),
        **spec,
    )
    return client.job.create(LeptonJob(metadata=Metadata(id=name), spec=job))


def shell(client: Any, script: str, **spec: Any) -> Any:
    return submit(client, ["bash", "-c", script], **spec)


def wait_for(what: Callable[[], Any], seconds: float = 5) -> Any:
    due = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < due, "waited too long"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """An orphan that was killed may wait, as a zombie, for an init that takes its time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def finished(client: Any, name: str = "a-job") -> Any:
    """The status of the job when it is over."""
    wait_for(lambda: client.job.get(name).status.state.value in FINISHED)
    return client.job.get(name).status


def log_of(client: Any, name: str = "a-job", index: int = 0) -> Iterator[str]:
    replicas = wait_for(lambda: client.job.get_replicas(name))
    (replica,) = [replica for replica in replicas if replica.metadata.id_.startswith(f"{name}-{index}-")]
    return client.job.get_log(name, replica)


def test_a_log_is_followed_while_the_job_runs_and_ends_with_it(client: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    shell(client, f"echo one; until [ -e {go} ]; do sleep 0.02; done; echo two >&2")
    pieces = log_of(client)
    assert next(pieces) == "one\n"
    assert client.job.get("a-job").status.state == "Running"
    go.touch()
    assert list(pieces) == ["two\n"]
    status = finished(client)
    assert (status.state, status.succeeded, status.failed, status.active) == ("Completed", 1, 0, 0)
    assert status.completion_time >= status.creation_time
    assert "".join(log_of(client)) == "one\ntwo\n"  # of a finished job: all of it, and an end


def test_a_job_that_exits_with_3_has_failed_and_takes_the_other_workers_with_it(client: Any, lepton: Lepton) -> None:
    shell(client, "[ $LEPTON_JOB_WORKER_INDEX = 1 ] || exec sleep 60; echo lost; exit 3", completions=2, parallelism=2)
    status = finished(client)
    assert (status.state, status.failed, status.succeeded) == ("Failed", 2, 0)
    assert "".join(log_of(client, index=1)) == "lost\n"
    assert lepton.processes() == []


def test_deleting_a_job_ends_its_processes_and_keeps_it_in_the_archive(client: Any, lepton: Lepton) -> None:
    from leptonai.api.v1.api_resource import ClientError

    shell(client, "setsid sleep 60 & sleep 60")
    wait_for(lambda: len(lepton.processes()) == 3)
    pids = lepton.processes()
    assert client.job.delete("a-job") is True
    assert finished(client).state == "Archived"
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(ClientError, match="404"):
        client.job.get("a-job", job_query_mode="alive_only")
    assert [job.metadata.id_ for job in client.job.list_all()] == []
    shell(client, "true")  # the name is free again
    assert finished(client).state == "Completed"


def test_sigterm_reaches_the_first_process_and_leaves_it_time(client: Any, lepton: Lepton) -> None:
    shell(client, "trap 'echo saved; exit 0' TERM; echo ready; sleep 60 & wait")
    pieces = log_of(client)
    assert next(pieces) == "ready\n"
    client.job.update("a-job", spec={"spec": {"stopped": True}})
    assert "".join(pieces) == "saved\n"
    assert finished(client).state == "Stopped"
    assert lepton.processes() == []


def test_secrets_reach_the_environment_and_nothing_else(client: Any, lepton: Lepton) -> None:
    from leptonai.api.v1.api_resource import ClientError
    from leptonai.api.v1.types.deployment import EnvValue, EnvVar
    from leptonai.api.v1.types.secret import SecretItem

    client.secret.create([SecretItem(name="hf", value="hf_s3cret")])
    assert [(item.name, item.value) for item in client.secret.list_all()] == [("hf", None)]
    envs = [
        EnvVar(name="HF_TOKEN", value_from=EnvValue(secret_name_ref="hf")),
        EnvVar(name="PLAIN", value="it's $HOME"),
    ]
    shell(client, 'echo "$HF_TOKEN|$PLAIN"', envs=envs)
    assert "".join(log_of(client)) == "hf_s3cret|it's $HOME\n"
    assert [method for method, path, body in lepton.requests if "hf_s3cret" in body] == ["POST"]
    assert "hf_s3cret" not in json.dumps(client.job.get("a-job").model_dump(mode="json"))
    client.secret.delete("hf")
    with pytest.raises(ClientError, match="hf"):
        shell(client, "true", name="another", envs=envs)


def test_a_worker_sees_its_own_environment_and_no_network(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_SUBMITTER", "1")
    shell(client, "env; wget -O x https://example.org; echo rc $?", resource_shape="gpu.8xh100-sxm")
    text = "".join(log_of(client))
    seen = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert "OF_THE_SUBMITTER" not in seen
    assert seen["LEPTON_JOB_SERVICE_PREFIX"] == seen["LEPTON_JOB_NAME"] == "a-job"
    assert (seen["LEPTON_SUBDOMAIN"], seen["LEPTON_JOB_TOTAL_WORKERS"]) == ("a-job-job-svc", "1")
    assert seen["LEPTON_RESOURCE_ACCELERATOR_NUM"] == "8"
    assert text.endswith("wget: no network in this test: -O x https://example.org\nrc 1\n")


@pytest.mark.skipif(not names_resolve(), reason="this machine allows no mount namespace")
def test_workers_find_the_first_one_by_its_name(client: Any) -> None:
    script = (
        "import os, socket\n"
        "at = os.environ['LEPTON_JOB_SERVICE_PREFIX'] + '-0.' + os.environ['LEPTON_SUBDOMAIN']\n"
        "print(os.environ['LEPTON_JOB_WORKER_INDEX'], at, socket.gethostbyname(at))\n"
    )
    submit(client, [sys.executable, "-c", script], completions=2, parallelism=2)
    for index in (0, 1):
        assert "".join(log_of(client, index=index)) == f"{index} a-job-0.a-job-job-svc 127.0.0.1\n"
    assert finished(client).succeeded == 2


def test_a_log_that_breaks_off_is_read_again_from_its_beginning(client: Any, lepton: Lepton, tmp_path: Path) -> None:
    from requests.exceptions import ChunkedEncodingError

    go = tmp_path / "go"
    shell(client, f"echo one; until [ -e {go} ]; do sleep 0.02; done; echo two")
    pieces = log_of(client)
    assert next(pieces) == "one\n"
    assert lepton.drop_logs() == 1
    with pytest.raises(ChunkedEncodingError):
        next(pieces)
    go.touch()
    assert "".join(log_of(client)) == "one\ntwo\n"


def test_a_queued_job_has_no_workers_and_can_be_cancelled(client: Any, lepton: Lepton) -> None:
    lepton.slow_start(60)
    shell(client, "echo never")
    assert client.job.get("a-job").status.state == "Queueing"
    assert client.job.get_replicas("a-job") == []
    client.job.delete("a-job")
    assert finished(client).state == "Archived"


def test_faults_are_what_the_client_raises(client: Any, lepton: Lepton) -> None:
    import requests
    from leptonai.api.v1.api_resource import ClientError, ServerError
    from leptonai.api.v2.utils import WorkspaceUnauthorizedError

    lepton.fail_next("/jobs", 503)
    with pytest.raises(ServerError, match="503"):
        client.job.get("a-job")
    with pytest.raises(ClientError, match="404"):
        client.job.get("a-job")
    lepton.down()
    with pytest.raises(requests.ConnectionError):
        client.job.get("a-job")
    lepton.up()
    assert [group.metadata.name for group in client.nodegroup.list_all()] == [NODE_GROUP]
    lepton.down(hang=True)
    with pytest.raises(requests.ReadTimeout):
        client._get("/workspace", timeout=0.2)
    lepton.up()
    lepton.token = "another"
    with pytest.raises(ClientError, match="401"):
        client.nodegroup.list_all()
    with pytest.raises(WorkspaceUnauthorizedError, match="Unauthorized access to the workspace"):
        client.info()


def test_what_no_cluster_could_run_is_refused(client: Any) -> None:
    from leptonai.api.v1.api_resource import ClientError
    from leptonai.api.v1.types.deployment import Mount

    missing = Mount(**{"path": "/", "mount_path": "/not-here", "from": "node-nfs:data"})
    for wrong in ({"resource_shape": "gpu.9000"}, {"name": "Not_A_Name"}, {"mounts": [missing]}):
        with pytest.raises(ClientError, match="400"):
            shell(client, "true", **wrong)
    shell(client, "true")
    with pytest.raises(ClientError, match="409"):
        shell(client, "true")
    submit(client, ["echo", "x" * 140_000], name="long")  # Linux takes no argument over 128 KB
    assert finished(client, "long").state == "Failed"
    assert "Argument list too long" in "".join(log_of(client, "long"))
    with pytest.raises(ClientError, match="too large"):
        submit(client, ["echo", *["x" * 100_000] * 16], name="larger")


def test_stop_leaves_nothing() -> None:
    lepton = Lepton(grace=5)
    from leptonai.api.v2.client import APIClient

    env = lepton.env
    client = APIClient(env["LEPTON_WORKSPACE_ID"], lepton.token, env["LEPTON_WORKSPACE_URL"])
    shell(client, "trap '' TERM; setsid sleep 60 & while :; do sleep 1; done")
    wait_for(lambda: len(lepton.processes()) >= 3)
    pids = lepton.processes()
    lepton.stop()
    assert not any(alive(pid) for pid in pids)
    assert not lepton.root.exists()
