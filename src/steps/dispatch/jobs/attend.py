"""Stay with a job on another machine until its end, as if it ran here."""

from __future__ import annotations

import signal
import sys
import time

from steps.dispatch import jobs
from steps.dispatch.executors.base import Executor
from steps.dispatch.job import CANCELLED, LOST, SUCCEEDED, JobRecord, JobSpec, Status, utc_now
from steps.dispatch.jobs.following import Following
from steps.dispatch.jobs.screen import Screen
from steps.dispatch.jobs.stops import Stops
from steps.errors import ExecutorError

_INTERRUPTED = 130
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


def attend(executor: Executor, spec: JobSpec) -> int:
    """Submit the job, show its log until its end, and return its own exit code: 130 when it was cancelled, 5 when it
    is lost, never 0 when it did not succeed.

    Ctrl-C asks once whether to cancel it, where there is somebody to ask; SIGTERM and a lost terminal cancel at once.
    Raises ExecutorError when it cannot be submitted.
    """
    screen = Screen()
    with Stops() as stops:
        cancelling = False
        try:
            with stops.held():
                executor.submit(spec)
        except KeyboardInterrupt:
            if not jobs.read(spec.directory).status.handle:  # it never came to the cluster
                reason = "stopped by the user before it was submitted"
                Status(CANCELLED, _INTERRUPTED, reason, ended_at=utc_now()).write(spec.directory)
                return _INTERRUPTED
            cancelling = _shall_be_cancelled(spec.id, stops)
            if not cancelling:
                return _leave(spec, screen)
        record = jobs.read(spec.directory)
        if not cancelling:
            screen.say(_submitted(record))
        with Following(executor, record, screen) as following:
            if not cancelling:
                try:
                    return exit_code(following.until_end().status)
                except KeyboardInterrupt:
                    if not _shall_be_cancelled(spec.id, stops):
                        return _leave(spec, screen)
            try:
                _cancel(executor, spec, screen)
                ended = following.until_end().status
            except KeyboardInterrupt:
                screen.say(f"job {spec.id} may still run; see: steps jobs status {spec.id.rpartition('-')[2]}")
                return _INTERRUPTED
        if ended.state == SUCCEEDED:
            screen.say(f"job {spec.id} had succeeded before it could be cancelled")
        return _INTERRUPTED


def exit_code(status: Status) -> int:
    """What a command that waited for the job exits with."""
    if status.state == SUCCEEDED:
        return 0
    if status.state in (CANCELLED, LOST):
        return _INTERRUPTED if status.state == CANCELLED else ExecutorError.exit_code
    return status.exit_code if status.exit_code and 0 < status.exit_code < 256 else 1


def _submitted(record: JobRecord) -> str:
    from steps.dispatch.jobs.view import number

    there = f" ({record.executor.capitalize()} {number(record.status)})" if number(record.status) else ""
    does = "asks whether to cancel it" if _somebody_is_there() else "cancels it"
    return f"job {record.id.rpartition('-')[2]} submitted{there}. Ctrl-C {does}."


def _somebody_is_there() -> bool:
    # Standard output may well go to a file.
    return sys.stdin.isatty() and sys.stderr.isatty()


def _shall_be_cancelled(identity: str, stops: Stops) -> bool:
    """Ask whoever pressed Ctrl-C. Nobody there, no answer or another Ctrl-C: yes."""
    if stops.number != signal.SIGINT or not _somebody_is_there():
        return True
    try:
        print(f"\ncancel job {identity}? [Y/n] ", end="", file=sys.stderr, flush=True)
        return not sys.stdin.readline().strip().lower().startswith("n")
    except (KeyboardInterrupt, OSError, ValueError):
        return True


def _leave(spec: JobSpec, screen: Screen) -> int:
    from steps.dispatch.sheet import submitted  # which knows the executors, and they know us

    for line in submitted(spec, jobs.read(spec.directory).status):
        screen.say(line)
    return _INTERRUPTED


def _cancel(executor: Executor, spec: JobSpec, screen: Screen) -> None:
    """Until it worked. Raises KeyboardInterrupt when the user has enough of it."""
    screen.say(f"cancelling job {spec.id}")
    pause = _FIRST_PAUSE
    while True:
        record: JobRecord = jobs.read(spec.directory)
        try:
            return executor.cancel(record)
        except ExecutorError as error:
            if pause == _FIRST_PAUSE:
                screen.say(f"cannot be cancelled ({error.problems[0].what}); trying again")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
