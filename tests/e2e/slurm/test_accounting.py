"""Where Slurm keeps accounts in a database: jobs that its controller has forgotten, and who may charge what."""

from __future__ import annotations

import getpass
import os
import time

import pytest
from support.slurm_accounting import AccountedCluster
from support.slurm_jobs import login_to, number, there

from steps.dispatch.executors.slurm.env import SlurmEnv
from steps.dispatch.executors.slurm.probe import probe
from steps.dispatch.executors.slurm.state import look
from steps.errors import ExecutorError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def accounted():
    if lack := AccountedCluster.missing():
        pytest.skip(lack)
    with AccountedCluster({"MinJobAge": "2"}) as running:
        yield running


def test_the_database_remembers_what_the_controller_forgot(accounted, tmp_path, monkeypatch):
    """None of these leaves an exit code of its own, and half an hour later nobody but accounting knows them."""
    place = login_to(accounted, tmp_path, monkeypatch)
    failed = place.submit("trap - EXIT; exit 3")
    never = place.submit("true", f"--dependency=afterok:{number(failed)}", "--kill-on-invalid-dep=yes")
    cancelled, held = place.submit("srun sleep 60"), place.submit("true", "--hold")
    accounted.wait_for(number(cancelled), "RUNNING")
    accounted.run("scancel", str(number(cancelled)), str(number(held)), check=True)
    jobs = [failed, never, cancelled, held]
    deadline = time.monotonic() + 40
    while any(accounted.show(number(job)) for job in jobs) or not all(status.ended for status in look(jobs)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    # the database hears of an end some seconds later than the queue
    while any(status.state == "lost" for status in look(jobs)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    by_me = f"CANCELLED by {os.getuid()}"
    assert [(status.state, status.reason) for status in look(jobs)] == [
        ("failed", "exit code 3"),
        ("cancelled", "DependencyNeverSatisfied"),
        ("cancelled", by_me),
        ("cancelled", by_me),
    ]
    assert look([failed])[0].exit_code == 3
    assert all(status.ended_at for status in look(jobs))
    del cancelled.status.handle["slurm_job_id"]
    (there(cancelled) / "slurm_job_id").unlink(missing_ok=True)
    assert look([cancelled])[0].handle["slurm_job_id"] == str(number_of(accounted, cancelled.id))


def number_of(cluster, name: str) -> int:
    """The number of a job by its name."""
    return int(cluster.run("sacct", "-nXP", "--name", name, "-S", "2020-01-01", "-o", "JobIDRaw").stdout)


def test_accounts_that_are_not_mine(accounted, tmp_path, monkeypatch):
    place = login_to(accounted, tmp_path, monkeypatch)
    for command in ("account name=llm_post", f"user name={getpass.getuser()} account=llm_post"):
        accounted.run("sacctmgr", "--immediate", "add", *command.split(), check=True)

    def problems(account: str) -> list[str]:
        env = SlurmEnv.model_validate({**place.env, "account": account})
        return [str(problem) for problem in probe(env) if problem.where == "run.env.account"]

    assert problems("llm_post") == []
    (message,) = problems("llm_pots")
    assert "you have no account 'llm_pots' on this cluster" in message
    assert message.endswith("Did you mean llm_post?")


def test_accounting_that_is_out_of_reach(accounted, tmp_path, monkeypatch):
    """It may know the job: nobody calls that one lost. The last test here: it stops the database's daemon."""
    place = login_to(accounted, tmp_path, monkeypatch)
    unknown, good = place.record(), place.submit("true")
    assert look([unknown])[0].state == "lost"
    accounted.wait_for(number(good), "COMPLETED")
    accounted.stop_accounting()
    assert look([good])[0].state == "succeeded"
    with pytest.raises(ExecutorError, match="does not answer: .*Connection refused"):
        look([unknown])
