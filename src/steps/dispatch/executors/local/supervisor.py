"""Stays with a job on this machine from its start to its end, and keeps its status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steps.dispatch import jobs, processes
from steps.dispatch.job import CANCELLED, FAILED, PENDING, RUNNING, SUCCEEDED, Status, utc_now
from steps.dispatch.jobs.stops import Stops
from steps.dispatch.jobs.watch import Watch

SCRIPT = "command.sh"
STOPPED = "stopped by the user"
#: What a step gets to end by itself.
GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.05
_OTHERS_SECONDS = 0.3
_CLUSTER_SECONDS = 10.0


def handle(pid: int) -> dict[str, Any]:
    """By which a job is found again whose supervisor is the process `pid`."""
    return {"host": processes.host(), "supervisor": pid, "supervisor_started": processes.started(pid)}


def waits_for(after: Sequence[str]) -> str:
    """Why a job behind these has not started."""
    return f"waits for {', '.join(map(jobs.short, after))}" if after else ""


def supervise(directory: Path, environment: Mapping[str, str], after: Sequence[str] = (), *, watched: bool) -> int:
    """Run the job's script to its end, once the jobs `after` have succeeded; returns its exit code (130 when it was
    stopped, or never started because one of those did not succeed)."""
    status = Status(PENDING, handle=handle(os.getpid()))
    child: subprocess.Popen[bytes] | None = None
    watch: Watch | None = None
    stopped, hindrance = False, ""
    with Stops() as stops:
        try:
            if after:
                hindrance = _wait_for(after, directory, status, aloud=watched)
            if not hindrance:
                watch = Watch(directory) if watched else None
                with stops.held():
                    child = _start(directory, environment, draws_bars=bool(watch and watch.draws_bars))
                    status.state, status.reason, status.started_at = RUNNING, "", utc_now()
                    status.handle |= {"pid": child.pid, "started": processes.started(child.pid)}
                    status.write(directory)
        except KeyboardInterrupt:
            stopped = True
        while child and child.poll() is None:
            try:
                if stopped:
                    _stop(child)
                watch = _look(watch)
                time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt:
                stopped = True
        with stops.held():
            code = child.returncode if child else 0
            if hindrance or stopped:
                status.state, status.exit_code, status.reason = CANCELLED, 130, hindrance or STOPPED
            else:
                status.state, status.exit_code = SUCCEEDED if code == 0 else FAILED, code if code >= 0 else 128 - code
                status.reason = _reason(code)
            status.ended_at = utc_now()
            status.write(directory)
        watch = _look(watch)
        if watch:
            watch.close()
    return status.exit_code


def _wait_for(after: Sequence[str], directory: Path, status: Status, *, aloud: bool) -> str:
    """Until all of these have succeeded: ''; or until one cannot any more: why this job will never start."""
    waiting = [jobs.by_id(name, directory) for name in after]
    told = ""
    while True:
        waiting = jobs.refresh(waiting)
        for other in waiting:
            if other.status.ended and other.status.state != SUCCEEDED:
                why = f" ({other.status.reason})" if other.status.reason else ""
                return f"{jobs.short(other.id)}, for which it waited, is {other.status.state}{why}"
        waiting = [other for other in waiting if not other.status.ended]
        if not waiting:
            return ""
        status.reason = waits_for([other.id for other in waiting])
        if status.reason != told:
            told = status.reason
            status.write(directory)
            if aloud:
                print(f"job {directory.name} {told}", file=sys.stderr, flush=True)
        here = all(other.executor == "local" for other in waiting)
        time.sleep(_OTHERS_SECONDS if here else _CLUSTER_SECONDS)


def _start(directory: Path, environment: Mapping[str, str], *, draws_bars: bool) -> subprocess.Popen[bytes]:
    told = {"STEPS_WATCHED": "1"} if draws_bars else {}
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            ["/bin/sh", os.fspath(directory / SCRIPT)],
            env={**environment, "PYTHONUNBUFFERED": "1", **told},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone; we pass it on and wait
            preexec_fn=_die_with_parent(),
        )


def _look(watch: Watch | None) -> Watch | None:
    """Show what is new. A screen that cannot be written to (`| head`, a full disk) ends the watching, never the job."""
    try:
        if watch:
            watch.update()
    except (OSError, ValueError):
        return None
    return watch


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}" if code else ""
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory, or kill -9)" if code == -signal.SIGKILL else "")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the whole process group to end, and insist after a while.

    SIGTERM, not SIGINT: before the step has its handlers in place, the one ends it quietly, the other with a traceback.
    """
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except ProcessLookupError:
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


def _die_with_parent() -> Callable[[], object] | None:
    """Makes a child end with us: kill -9 on us must not leave a step behind that writes on unseen (Linux)."""
    if sys.platform != "linux":
        return None
    import ctypes  # before the fork: the child must not import

    libc, pr_set_pdeathsig = ctypes.CDLL(None), 1
    return lambda: libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
