"""On DGX Cloud Lepton: as many workers as there are nodes, each a container that sees the workspace's shared storage.

We render (`script`), NeMo-Run submits (`submit`), and the rest is asked of the workspace through leptonai's client
(`client`). The storage cannot be read from here, so a job tells its exit code, its summary and its metrics in the last
lines of its log (`trailer`), which are not shown (`logs`). Lepton forgets logs when a job is deleted: the whole log is
stored here when the job has ended.

A job's exit code is that of the first worker that failed by itself. Secrets become secrets of the workspace, which only
the user sees, until somebody looks at the job after its end; their names follow from the job's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steps.artifacts.record import write_text
from steps.config.base import RunEnv, StepConfig
from steps.dispatch.executors.lepton import checks, script, state
from steps.dispatch.executors.lepton.client import NotThere, Workspace
from steps.dispatch.executors.lepton.env import LeptonEnv
from steps.dispatch.executors.lepton.logs import Log
from steps.dispatch.executors.lepton.trailer import Trailer
from steps.dispatch.job import RUNNING, SUBMITTING, JobRecord, JobSpec, Status, utc_now
from steps.errors import Problem


class Lepton:
    """Executor `lepton`."""

    env: type[RunEnv] = LeptonEnv
    imports_images = False
    has_order = False

    def workspace(self, env: LeptonEnv) -> str | None:
        return env.workspace or env.remote_job_dir or env.nemo_run_dir or "/"

    def sees_this_machine(self, env: LeptonEnv) -> bool:
        return False

    def check(self, config: StepConfig, env: LeptonEnv) -> Iterable[Problem]:
        return checks.check(env)

    def probe(self, env: LeptonEnv) -> Iterable[Problem]:
        return checks.probe(env)

    def render(self, spec: JobSpec) -> Mapping[str, str]:
        return script.render(spec)

    def submit(self, spec: JobSpec) -> Status:
        from steps.dispatch.executors.lepton.submit import submit

        return submit(spec)

    def attach(self, spec: JobSpec) -> int:
        from steps.dispatch.jobs.attend import attend

        return attend(self, spec)

    def place(self, job: JobRecord) -> str:
        return f"workspace {job.status.handle.get('workspace', '')}"

    def look(self, jobs: Sequence[JobRecord]) -> list[Status]:
        workspace = Workspace()
        for job in jobs:
            workspace.must_hold(job)
        found = workspace.jobs(_name(job) for job in jobs)
        return [_status(workspace, job, found.get(_name(job))) for job in jobs]

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[bytes]:
        stored = job.directory / "log"
        if job.status.ended and stored.exists() and stored.stat().st_size:  # only fetch() writes it, whole
            with stored.open("rb") as file:
                yield from iter(lambda: file.read(1 << 16), b"")
            return
        expected = job.status.reason == SUBMITTING
        yield from Log(Workspace.of(job), _name(job), job.id).pieces(follow=follow, expected=expected)

    def cancel(self, job: JobRecord) -> None:
        if job.status.ended:
            return
        workspace, name = Workspace.of(job), _name(job)
        _remove_mover(workspace, job)
        try:
            if state.word(workspace.job(name)) not in state.ENDED:
                workspace.stop(name)
        except NotThere:
            pass  # it never came so far, or is gone
        workspace.delete_secrets(_secrets(job))

    def fetch(self, job: JobRecord) -> None:
        workspace = Workspace.of(job)
        log = Log(workspace, _name(job), job.id)
        beside = job.directory / ".log.tmp"
        with beside.open("wb") as file:
            file.writelines(log.pieces(follow=False))
            size = file.tell()
        if size:
            beside.replace(job.directory / "log")
        else:  # deleted with its job: what was stored before is all there is
            beside.unlink()
        _write(job.directory / "summary.json", log.trailer.summary)
        _write(job.directory / "metrics.jsonl", log.trailer.metrics)
        _remove_mover(workspace, job)
        workspace.delete_secrets(_secrets(job))


EXECUTOR = Lepton()


def _name(job: JobRecord) -> str:
    return str(job.status.handle.get("lepton_job_id") or script.name(job.id))


def _secrets(job: JobRecord) -> list[str]:
    return list(map(str, job.status.handle.get("secrets") or ()))


def _remove_mover(workspace: Workspace, job: JobRecord) -> None:
    """The job that brings the files, where a submission was cut off before it could."""
    if "mover" in job.status.handle or not job.status.handle:
        workspace.delete(script.name(job.id, "move"))


def _status(workspace: Workspace, job: JobRecord, found: Any) -> Status:
    if found is None:
        return state.gone(job.status)
    trailer = Trailer()
    if state.word(found) in ("Completed", "Failed", "Stopped"):
        log = Log(workspace, _name(job), job.id)
        for _ in log.pieces(follow=False):
            pass
        trailer = log.trailer
    status = state.status(found, job.status, trailer)
    if status.state == RUNNING and not status.started_at:
        status.started_at = utc_now()  # seen running; its own word comes with its end
    return status


def _write(path: Path, text: str) -> None:
    if text:
        write_text(path, text)
