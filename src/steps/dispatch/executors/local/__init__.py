"""On this machine: a process of its own, its output in the job's log, shown here while someone watches."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from steps.config.base import RunEnv, StepConfig
from steps.dispatch import processes
from steps.dispatch.executors.local import supervisor
from steps.dispatch.executors.local.supervisor import SCRIPT
from steps.dispatch.job import (
    CANCELLED,
    LOST,
    PENDING,
    JobRecord,
    JobSpec,
    Status,
    quote,
    read_status,
    setup_commands,
    step_arguments,
    utc_now,
)
from steps.errors import ExecutorError, Problem

_POLL_SECONDS = 0.2
#: Longer than the supervisor gives its step before it insists.
_CANCEL_SECONDS = supervisor.GRACE_SECONDS + 10


class Local:
    """Executor `local`. Handle of a job: host; supervisor and supervisor_started, the process that watches over it; pid
    and started, the job's own process, once there is one."""

    env = RunEnv
    imports_images = False
    has_order = True

    def workspace(self, env: RunEnv) -> str | None:
        return None

    def sees_this_machine(self, env: RunEnv) -> bool:
        return True

    def check(self, config: StepConfig, env: RunEnv) -> Iterable[Problem]:
        yield from config.launch_here()
        if (env.nodes or 1) > 1:
            hint = "Use a Slurm profile for several nodes."
            yield Problem(where="run.env.nodes", what="this machine is one node", allowed="1", hint=hint)

    def probe(self, env: RunEnv) -> Iterable[Problem]:
        return ()

    def render(self, spec: JobSpec) -> Mapping[str, str]:
        return {SCRIPT: script(spec)}

    def attach(self, spec: JobSpec) -> int:
        return supervisor.supervise(spec.directory, {**os.environ, **spec.secret_env}, spec.after, watched=True)

    def submit(self, spec: JobSpec) -> Status:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, os.fspath(spec.directory), *spec.after],
            env={**os.environ, **spec.secret_env},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert child.stdin
        status = Status(PENDING, reason=supervisor.waits_for(spec.after) or "starting")
        status.handle = supervisor.handle(child.pid)
        try:
            status.write(spec.directory)
        except OSError as error:
            child.kill()
            raise ExecutorError(f"{spec.directory} cannot be written: {error.strerror}") from error
        finally:
            child.stdin.close()  # the supervisor has waited for this: from now on the status is its own to write
        return status

    def place(self, job: JobRecord) -> str:
        return "here"

    def look(self, jobs: Sequence[JobRecord]) -> list[Status]:
        return [_now(job) for job in jobs]

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), (job.directory / "log").open("rb") as log:
            while True:
                ended = not follow or _now(job).ended  # before the last reading: what comes between is not lost
                while piece := log.read(1 << 16):
                    yield piece
                if ended:
                    return
                yield b""
                time.sleep(_POLL_SECONDS)

    def cancel(self, job: JobRecord) -> None:
        status = _now(job)
        if status.ended:
            return
        handle = status.handle
        if not handle:
            raise ExecutorError(f"job {job.id} is being submitted by another process at this moment")
        if handle["host"] != processes.host():
            raise ExecutorError(f"job {job.id} runs on {handle['host']}", hint="Cancel it there.")
        watcher = handle["supervisor"], handle["supervisor_started"]
        if processes.lives(*watcher):
            with contextlib.suppress(ProcessLookupError):
                os.kill(watcher[0], signal.SIGTERM)
            processes.wait_until(lambda: not processes.lives(*watcher), _CANCEL_SECONDS)
        handle = read_status(job.directory).handle
        if "pid" in handle and processes.session_lives(handle["pid"], handle["started"]):
            processes.stop_session(handle["pid"], supervisor.GRACE_SECONDS)
        status = read_status(job.directory)
        if not status.ended and not processes.lives(*watcher):  # it had no time to say so
            status.state, status.exit_code, status.reason = CANCELLED, 130, supervisor.STOPPED
            status.ended_at = utc_now()
            status.write(job.directory)

    def fetch(self, job: JobRecord) -> None:
        pass


def _now(job: JobRecord) -> Status:
    """status.json, doubted: what it says is true as long as the one who writes it is there."""
    status = read_status(job.directory)
    handle = status.handle
    if status.ended or not handle or handle["host"] != processes.host():
        return status
    if processes.lives(handle["supervisor"], handle["supervisor_started"]):
        return status
    status = read_status(job.directory)  # again: it may have come to its end just now
    if status.ended:
        return status
    status.reason = f"its supervisor (process {handle['supervisor']}) is gone"
    if "pid" in status.handle and processes.session_lives(status.handle["pid"], status.handle["started"]):
        status.reason += "; the job still runs, and nobody will see how it ends"
    else:
        status.state = LOST
        status.reason += "; nobody saw how the job ended" if status.started_at else " and never started the job"
    return status


def script(spec: JobSpec) -> str:
    """command.sh: the environment that may be written down, then the command. Secrets come with the process."""
    python = [sys.executable]
    if spec.torchrun:
        # --standalone picks a free rendezvous port, so that two jobs on one machine never meet.
        python += ["-m", "steps.runtime.torchrun", "--standalone", f"--nproc-per-node={spec.nprocs}"]
    exports = [f"export {name}={quote([value])}" for name, value in spec.env.items()]
    before = setup_commands(spec.environment, sys.executable)
    before = ["set -e", *before] if before else []
    return "\n".join(["#!/bin/sh", *exports, *before, f"exec {quote([*python, *step_arguments(spec)])}", ""])


EXECUTOR = Local()
