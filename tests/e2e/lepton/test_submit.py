"""Submission to a Lepton workspace, through NeMo-Run: what arrives, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.lepton_site import DEMO, Site, until

from steps.config import yaml12
from steps.dispatch import jobs
from steps.dispatch.executors.lepton import EXECUTOR, script
from steps.dispatch.job import create
from steps.errors import ExecutorError

ODD = """a b "c" 'd' $(touch pwned) `touch pwned` $HOME back\\slash # hash; end\nsecond line"""
SECRET = "hf_ThisMustNeverBeSeen"
SHOW = "import json, os, sys; print(json.dumps(dict(os.environ))); print(sys.argv)"


def test_detached_through_the_command_line(site: Site):
    """Submitted, followed from another process to its end, listed; the output lies on the workspace's storage."""
    done = site.steps("run", *DEMO, "-b", "here")
    assert (done.returncode, done.stderr) == (0, "")
    name = re.search(r"^job (\S+) is pending$", done.stdout, re.MULTILINE)[1]
    assert f"  steps jobs logs -f {name[-6:]}" in done.stdout.splitlines()
    followed = site.steps("jobs", "logs", "-f", name)
    assert followed.returncode == 0
    assert followed.stdout.startswith("raw_jsonl written to ")
    assert "[steps" not in followed.stdout
    assert f"job {name} succeeded" in followed.stderr
    record = site.record()
    assert (record.status.state, record.status.exit_code) == ("succeeded", 0)
    assert record.status.started_at <= record.status.ended_at
    assert json.loads((record.directory / "summary.json").read_text())["conversations"] == 3
    assert (record.directory / "log").read_text() == followed.stdout
    assert (site.store / "output/tiny/chat/conversations.jsonl").read_text().count("\n") == 3
    assert "succeeded" in site.steps("jobs", "list").stdout
    assert site.steps("jobs", "logs", name).stdout == followed.stdout
    assert not [path for path in (site.directory / "home").rglob("*") if "nemo" in path.name]


def test_attached_through_the_command_line(site: Site):
    done = site.steps("run", *DEMO, "-r", "here")
    assert done.returncode == 0, done.stderr
    assert "raw_jsonl written to " in done.stdout
    assert "conversations: 3" in done.stdout


@pytest.mark.parametrize("flag", ["-r", "-b"])
def test_the_exit_code_of_a_job_that_fails_is_its_own(site: Site, flag: str):
    site.profile(startup_commands=["echo about to fail", "exit 3"])
    done = site.steps("run", *DEMO, flag, "here")
    assert done.returncode == (3 if flag == "-r" else 0)
    if flag == "-r":
        assert "about to fail" in done.stdout
        assert "data_prep/demo_chat failed: exit code 3. Log: " in done.stderr
    record = site.ended(site.record())
    assert (record.status.state, record.status.exit_code, record.status.reason) == ("failed", 3, "exit code 3")
    shown = site.steps("jobs", "status", record.id).stdout
    assert "exit code 3" in shown
    assert "about to fail" in shown


def test_what_a_job_gets(site: Site):
    """Its environment and arguments, whatever is in them; our code; a directory of its own. No wget, no /nemo_run."""
    given = {"env": {"ODD": ODD, "EMPTY": ""}, "passthrough": ("--odd", ODD)}
    job = site.ended(site.submit(SHOW, {"secret_vars": {}}, **given))
    log = (job.directory / "log").read_text()
    environment, arguments = log.splitlines()
    seen = json.loads(environment)
    assert (seen["ODD"], seen["EMPTY"]) == (ODD, "")
    there = site.store / "nemo-run" / job.id
    assert seen["PYTHONPATH"] == f"{there}/code:{site.directory}"
    assert seen["PWD"] == f"{there}/work"
    assert arguments == str(
        [str(site.directory / "program_0.py"), "--config", f"{there}/config.yaml", "--", "--odd", ODD]
    )
    assert not list(site.directory.rglob("pwned"))
    assert sorted(path.name for path in there.iterdir()) == [
        "code", "config.yaml", "job.yaml", "launch_script.sh", "lepton.json", "work",
    ]  # fmt: skip
    assert "no network in this test" not in log


def test_the_request_is_the_one_that_was_shown_with_ids_for_names(site: Site):
    job = site.submit(SHOW)
    *_, (_, _, body) = [call for call in site.lepton.requests if call[:2] == ("POST", "/jobs")]
    posted, shown = json.loads(body), json.loads((job.directory / "lepton.json").read_text())
    assert posted["spec"].pop("affinity") == {
        "allowed_dedicated_node_groups": ["my-group-4f2a"],
        "allowed_nodes_in_node_group": ["node-a", "node-b"],
    }
    assert shown["spec"].pop("affinity") == {"allowed_dedicated_node_groups": ["my-group"]}
    assert shown["spec"].pop("ttl_seconds_after_finished") is None  # kept until somebody deletes it
    assert posted == shown


def test_the_request_is_what_nemo_run_would_have_sent(site: Site):
    """NeMo-Run's own executor, given the same job: only the command differs, which it does not quote."""
    from nemo_run.core.execution.lepton import LeptonExecutor

    more = {
        "node_reservation": "res-1", "can_be_preempted": True, "queue_priority": "low-1000",
        "image_pull_secrets": ["ngc"], "secret_vars": {"KEY": "team-key"}, "shared_memory_size": 1024,
    }  # fmt: skip
    site.lepton.secrets["team-key"] = "value"
    job = site.submit("", more, nodes=2, env={"A": "1"})
    env = {key: value for key, value in {**site.run_env, **more}.items() if key not in ("executor", "workspace")}
    variables = {"PYTHONPATH": str(site.directory), "PYTHONDONTWRITEBYTECODE": "1", "A": "1"}
    theirs = LeptonExecutor(**{**env, "container_image": "registry.example/image:1", "nodes": 2}, env_vars=variables)
    theirs.lepton_job_dir = job.status.handle["directory"]
    theirs.create_lepton_job("theirs")
    ours, reference = [json.loads(body) for method, path, body in site.lepton.requests if path == "/jobs" and body][-2:]
    for posted in (ours, reference):
        posted["metadata"].pop("id")
        posted["spec"]["container"].pop("command")
        posted["spec"]["affinity"]["allowed_nodes_in_node_group"].sort()
    assert ours == reference


def test_only_the_job_is_left_in_the_workspace(site: Site):
    """The job that brought the files is gone, and so are the secrets."""
    job = site.ended(site.submit(SHOW, secret_env={"HF_TOKEN": SECRET}))
    assert [other.id for other in site.lepton.jobs if other.state != "Deleted"] == [job.status.handle["lepton_job_id"]]
    assert site.lepton.secrets == {}


def test_secrets_are_in_the_jobs_environment_and_nowhere_else(site: Site):
    """Every file, every request, every line on the screen: only the call that makes the secret holds its value."""
    print_length = "import os; print(len(os.environ['HF_TOKEN']), len(os.environ['TEAM']), flush=True)"
    site.lepton.secrets["team-secret"] = "of the team"
    (site.directory / "sitecustomize.py").write_text(print_length)
    site.profile(
        env_vars={"HF_TOKEN": "${oc.env:HF_TOKEN}", "PYTHONPATH": str(site.directory)},
        secret_vars={"TEAM": "team-secret"},
    )
    outputs = [site.steps("run", *DEMO, flag, "here", env={"HF_TOKEN": SECRET}) for flag in ("-d", "-r", "-b")][1:]
    outputs += [site.steps("run", *DEMO, "-d", "-r", "here", env={"HF_TOKEN": SECRET})]
    record = site.ended(site.record())
    outputs += [site.steps("jobs", *command) for command in (["list"], ["status", record.id], ["logs", record.id])]
    assert [done.returncode for done in outputs] == [0] * len(outputs), [done.stderr for done in outputs]
    assert f"{len(SECRET)} 11" in (record.directory / "log").read_text()
    assert not [done.args for done in outputs if SECRET in done.stdout + done.stderr]
    holding = [path for path in site.directory.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == []
    calls = {(method, path) for method, path, body in site.lepton.requests if SECRET in body + path}
    assert calls == {("POST", "/usersecrets")}
    assert site.lepton.secrets == {"team-secret": "of the team"}


def test_a_token_that_is_not_valid(site: Site):
    done = site.steps("run", *DEMO, "-b", "here", env={"LEPTON_WORKSPACE_TOKEN": "a-wrong-token"})
    assert done.returncode == 5
    assert "error: Lepton workspace ws refuses the token (unauthorized). Run `lep login`" in done.stderr
    assert "wrong" not in done.stderr
    status = site.record().status
    assert (status.state, status.reason) == (
        "failed", "not submitted: Lepton workspace ws refuses the token (unauthorized)",
    )  # fmt: skip


def test_no_credentials(site: Site):
    site.env = {
        "LEPTON_WORKSPACE_ID": "",
        "LEPTON_WORKSPACE_TOKEN": "",
        "LEPTON_CACHE_DIR": str(site.directory / "none"),
    }
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 5
    assert "error: there are no credentials for DGX Cloud Lepton. Run `lep login`" in done.stderr
    assert (site.record().status.state, site.lepton.requests) == ("failed", [])


def test_an_id_without_a_token(site: Site):
    site.env = {"LEPTON_WORKSPACE_TOKEN": ""}
    done = site.steps("run", *DEMO, "-b", "here")
    assert (done.returncode, "there are no credentials" in done.stderr) == (5, True)


def test_a_server_that_is_down(site: Site):
    site.lepton.down()
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 5
    assert "error: Lepton workspace ws cannot be reached: connection refused. Check the network" in done.stderr


def test_a_node_group_that_is_not_there(site: Site):
    site.profile(node_group="my-gruop")
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 5
    assert "has no node group 'my-gruop'. Did you mean my-group?" in done.stderr
    assert site.record().status.state == "failed"


def test_a_profile_that_lacks_everything(site: Site):
    site.profile(node_group=None, resource_shape=None, nemo_run_dir=None, mounts=[{"path": "/", "mount_path": "/x"}])
    done = site.steps("run", *DEMO, "-b", "here")
    assert done.returncode == 5
    for where in ("nemo_run_dir", "node_group", "resource_shape", "mounts.0.from", "workspace"):
        assert f"run.env.{where}: " in done.stderr
    assert site.lepton.requests == []


@pytest.mark.parametrize("path", ["/usersecrets", "/jobs", "/jobs/move"])
def test_a_submission_that_fails_on_the_way_leaves_nothing(site: Site, path: str):
    site.lepton.fail_next(path, 503)
    with pytest.raises(ExecutorError, match="failed with status 503"):
        site.submit("", secret_env={"HF_TOKEN": SECRET})
    assert site.lepton.secrets == {}
    assert {job.state for job in site.lepton.jobs} <= {"Deleted"}
    status = site.record().status
    assert (status.state, status.reason) == ("failed", "not submitted: Lepton workspace ws failed with status 503")


def test_a_storage_that_cannot_be_written(site: Site):
    (site.store / "nemo-run").touch()
    with pytest.raises(ExecutorError, match=r"could not be brought to the storage: .*nemo-run.*Not a directory"):
        site.submit("", secret_env={"HF_TOKEN": SECRET})
    assert {job.state for job in site.lepton.jobs} == {"Deleted"}
    assert site.lepton.secrets == {}


def test_a_submission_that_is_killed_is_found_or_lost(site: Site):
    """Killed while its files are on their way: the next look says so, and removes what it left."""
    site.profile(env_vars={"HF_TOKEN": SECRET})
    site.lepton.slow_start(60)
    process = site.start("run", *DEMO, "-b", "here")
    until(lambda: site.lepton.jobs)
    assert "being submitted" in site.steps("jobs", "list").stdout
    process.kill()
    process.communicate()
    record = site.record()
    record.asked["submitted_at"] = "2026-01-01T00:00:00+00:00"
    (record.directory / "job.yaml").write_text(yaml12.dump(dict(record.asked)))  # as if a minute had passed
    assert "its submission was cut off before Lepton had it" in site.steps("jobs", "list").stdout
    assert {job.state for job in site.lepton.jobs} <= {"Deleting", "Deleted"}
    assert site.lepton.secrets == {}


def test_a_job_whose_submission_was_killed_at_the_last_moment_is_found(site: Site):
    """The job is there, and what was written down is from before."""
    job = site.submit("print('ran')", secret_env={"HF_TOKEN": SECRET})
    mover = script.name(job.id, "move")
    handle = {**job.status.handle, "mover": mover}
    status = json.loads((job.directory / "status.json").read_text())
    (job.directory / "status.json").write_text(json.dumps({**status, "reason": "being submitted", "handle": handle}))
    ended = site.ended(job)
    assert ended.status.state == "succeeded"
    assert (ended.directory / "log").read_text() == "ran\n"


def test_a_submission_whose_answer_was_lost_is_found(site: Site, monkeypatch):
    """The workspace has the job, we never heard of it, and it cannot be asked any more."""
    import requests
    from leptonai.api.v1.job import JobAPI

    real = JobAPI.create

    def create_and_break_off(self, job):
        created = real(self, job)
        if not job.metadata.id_.startswith("move-"):
            site.lepton.down()
            raise requests.ConnectionError("Connection aborted.")
        return created

    monkeypatch.setattr(JobAPI, "create", create_and_break_off)
    with pytest.raises(ExecutorError, match="the connection broke off"):
        site.submit("print('ran')", secret_env={"HF_TOKEN": SECRET})
    assert (site.record().status.state, site.record().status.reason) == ("pending", "being submitted")
    site.lepton.up()
    ended = site.ended(site.record())
    assert ended.status.state == "succeeded"
    assert (ended.directory / "log").read_text() == "ran\n"
    assert site.lepton.secrets == {}


def test_many_at_once_are_none_lost_and_none_confused(site: Site):
    specs = [site.spec(f"print('this is {number}')") for number in range(8)]
    for spec in specs:
        create(spec, EXECUTOR.render(spec))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(EXECUTOR.submit, specs))
    for number, spec in enumerate(specs):
        ended = site.ended(jobs.read(spec.directory))
        assert ended.status.state == "succeeded"
        assert (ended.directory / "log").read_text() == f"this is {number}\n"


def test_looking_at_jobs_does_not_import_nemo_run(site: Site):
    site.ended(site.submit(""))
    code = (
        "import sys; from steps.dispatch import jobs; jobs.refresh([jobs.find('latest')]);"
        "from steps.dispatch.executors.lepton import EXECUTOR; EXECUTOR.look([jobs.find('latest')]);"
        "assert 'leptonai' in sys.modules; assert not {'nemo_run', 'torch'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
