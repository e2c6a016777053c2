"""On this machine: a process of its own, its output in the job's log, shown here while someone watches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from steps.config.base import RunEnv, StepConfig
from steps.dispatch.job import JobRecord, JobSpec, Status, quote, read_status, setup_commands, step_arguments, utc_now
from steps.dispatch.watch import Watch
from steps.errors import Problem

SCRIPT = "command.sh"
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 15.0


class Local:
    """Executor `local`."""

    env = RunEnv
    imports_images = False
    has_order = False

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
        return supervise(spec.directory, {**os.environ, **spec.secret_env}, watched=True)

    def submit(self, spec: JobSpec) -> Status:
        subprocess.Popen(
            [sys.executable, "-m", "steps.dispatch.executors.local", os.fspath(spec.directory)],
            env={**os.environ, **spec.secret_env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return Status()

    def look(self, jobs: Sequence[JobRecord]) -> list[Status]:
        return [read_status(job.directory) for job in jobs]

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[bytes]:
        yield (job.directory / "log").read_bytes()

    def cancel(self, job: JobRecord) -> None:
        raise NotImplementedError

    def fetch(self, job: JobRecord) -> None:
        pass


EXECUTOR = Local()


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


def supervise(directory: Path, environment: Mapping[str, str], *, watched: bool) -> int:
    """Run the job's script to its end and keep its status; returns its exit code (130 when stopped by Ctrl-C)."""
    watch = Watch(directory) if watched else None
    told = {"STEPS_WATCHED": "1"} if watch and watch.draws_bars else {}
    status = Status("running", started_at=utc_now())
    with (directory / "log").open("ab") as log:
        child = subprocess.Popen(
            ["/bin/sh", os.fspath(directory / SCRIPT)],
            env={**environment, "PYTHONUNBUFFERED": "1", **told},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone; we pass it on and wait
            preexec_fn=_die_with_parent(),
        )
    status.handle = {"pid": child.pid, "host": os.uname().nodename}
    status.write(directory)
    stopped = False
    # A lost terminal (SIGHUP) stops the job as Ctrl-C does, unless it was started to outlive it (nohup).
    hooked = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, signal.default_int_handler) for number in hooked}
    try:
        while child.poll() is None:
            try:
                watch = _look(watch)
                time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt:
                stopped = True
                _stop(child)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    watch = _look(watch)
    if watch:
        watch.close()
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    status = read_status(directory)
    status.state = "cancelled" if stopped else "succeeded" if code == 0 else "failed"
    status.exit_code = 130 if stopped else code
    status.reason = _reason(child.returncode, stopped)
    status.ended_at = utc_now()
    status.write(directory)
    return status.exit_code


def _look(watch: Watch | None) -> Watch | None:
    """Show what is new. A screen that cannot be written to (`| head`, a full disk) ends the watching, never the job."""
    try:
        if watch:
            watch.update()
    except (OSError, ValueError):
        return None
    return watch


def _reason(code: int, stopped: bool) -> str:
    if stopped:
        return "stopped by the user"
    if code >= 0:
        return f"exit code {code}" if code else ""
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory, or kill -9)" if code == -signal.SIGKILL else "")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the whole process group to end, and insist after a while.

    SIGTERM, not SIGINT: before the step has its handlers in place, the one ends it quietly, the other with a traceback.
    """
    for number, seconds in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except ProcessLookupError:
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


def _die_with_parent() -> Callable[[], None] | None:
    """Makes a child end with us: kill -9 on us must not leave a step behind that writes on unseen (Linux)."""
    if sys.platform != "linux":
        return None
    import ctypes  # before the fork: the child must not import

    libc, pr_set_pdeathsig = ctypes.CDLL(None), 1
    return lambda: libc.prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), os.environ, watched=False))
