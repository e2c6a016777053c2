"""Jobs of several workers or processes in a Lepton workspace: torchrun, and whose failure is told."""

from __future__ import annotations

import re
import time

import pytest
from support.lepton_following import WAIT, Reader, running, say
from support.lepton_jobs import Replica, names_resolve
from support.lepton_site import Site, until

from steps.dispatch.executors.lepton import EXECUTOR

needs_names = pytest.mark.skipif(not names_resolve(), reason="this machine allows no mount namespace")


REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()} sum {value.item()}\\n".encode())  # one write, one line
dist.destroy_process_group()
"""


@needs_names
def test_two_workers_with_two_processes_meet(site: Site):
    job = site.ended(site.submit(REDUCE, nodes=2, nprocs=2, torchrun=True, env={"OMP_NUM_THREADS": "1"}))
    log = (job.directory / "log").read_text()
    assert job.status.state == "succeeded", log
    assert sorted(re.findall(r"rank .*", log)) == ["rank 0 of 4 sum 10.0", "rank 1 of 4 sum 10.0"]  # of worker 0
    other = site.remote(job).replicas[1].log.read_text()
    assert sorted(re.findall(r"rank .*", other)) == ["rank 2 of 4 sum 10.0", "rank 3 of 4 sum 10.0"]


@needs_names
def test_a_second_worker_that_fails_gives_the_job_its_exit_code_and_its_last_lines(site: Site):
    program = f"{REDUCE.replace('dist.destroy', '#')}\nimport os, time\n"
    # At once: on its way through sys.exit, gloo sometimes aborts a process whose group still stands (exit code 134).
    program += "if dist.get_rank() == 1: print('this is why', flush=True); os._exit(3)\ntime.sleep(60)\n"
    job = site.ended(site.submit(program, nodes=2, torchrun=True, env={"OMP_NUM_THREADS": "1"}))
    assert (job.status.state, job.status.exit_code) == ("failed", 3)
    assert job.status.reason == "exit code 3 of worker 1"
    log = (job.directory / "log").read_text()
    head, _, tail = log.partition("--- the last lines of worker 1, which failed first ---\n")
    assert "rank 0 of 2 sum 3.0" in head
    assert "this is why" in tail
    assert "[steps" not in log


@needs_names
def test_a_second_worker_that_is_killed(site: Site):
    """Its script could say nothing."""
    program = REDUCE.replace("dist.destroy", "#") + "\nimport time\ntime.sleep(60)\n"
    job = site.submit(program, nodes=2, torchrun=True, env={"OMP_NUM_THREADS": "1"})
    until(lambda: "rank 1" in site.remote(job).replicas[1].log.read_text())
    site.remote(job).replicas[1].process.kill()
    ended = site.ended(job)
    assert (ended.status.state, ended.status.exit_code) == ("failed", None)
    assert ended.status.reason.startswith("Failed: worker 1 was killed (out of memory?), or its node was lost")


@needs_names
def test_two_workers_are_cancelled(site: Site):
    program = REDUCE.replace("dist.destroy", "#") + "\nimport time\ntime.sleep(60)\n"
    job = site.submit(program, nodes=2, torchrun=True, env={"OMP_NUM_THREADS": "1"})
    running(site, job, "rank 0")
    EXECUTOR.cancel(job)
    assert site.ended(job).status.state == "cancelled"
    assert site.lepton.processes() == []
    assert "Traceback" not in (job.directory / "log").read_text()


def test_a_first_worker_that_ends_early_is_not_read_again_and_again(site: Site):
    go = site.directory / "go"
    program = f"import os\nif os.environ['LEPTON_JOB_WORKER_INDEX'] == '1':\n  {say('one')}\n  {WAIT.format(str(go))}"
    job = site.submit(program.replace("\nwhile", "\n  while"), nodes=2)
    reader = Reader(job)
    until(lambda: site.remote(job).replicas[0].rc == 0)
    time.sleep(2.5)
    go.touch()
    assert reader.end() == ""
    assert len([path for _, path, _ in site.lepton.requests if path.endswith("/log")]) == 1


def test_a_first_worker_that_is_started_again_is_followed(site: Site):
    """As after making room for another job: a new worker with a log of its own."""
    go = site.directory / "go"
    program = f"import os\nif os.environ['LEPTON_JOB_WORKER_INDEX'] == '1':\n  {WAIT.format(str(go))}\n{say('one')}"
    job = site.submit(program.replace("\nwhile", "\n  while"), nodes=2)
    reader, remote = Reader(job), site.remote(job)
    until(lambda: reader.text == "one\n" and remote.replicas[0].gone.is_set())
    again = Replica(remote.id, 0, remote.root)
    again.start(["bash", "-c", f"echo again; until [ -e {go} ]; do sleep 0.02; done"], remote.environment)
    remote.replicas[0] = again
    until(lambda: reader.text == "one\nagain\n")
    go.touch()
    assert reader.end() == "one\nagain\n"


def test_one_worker_with_two_processes(site: Site):
    job = site.ended(site.submit(REDUCE, nprocs=2, torchrun=True, env={"OMP_NUM_THREADS": "1"}))
    log = (job.directory / "log").read_text()
    assert sorted(re.findall(r"rank .*", log)) == ["rank 0 of 2 sum 3.0", "rank 1 of 2 sum 3.0"]
