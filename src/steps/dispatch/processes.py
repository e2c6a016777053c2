"""Processes of this machine, told apart for certain: a pid alone may belong to somebody else tomorrow."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def host() -> str:
    return os.uname().nodename


def started(pid: int) -> str:
    """When the process began, in the kernel's own words; '' when there is none, or only what is left of one (zombie).

    Together with the pid it names one process for ever.
    """
    if sys.platform == "linux":
        fields = _stat(pid)
        return fields[19] if fields and fields[0] not in "ZX" else ""
    told = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout
    state, _, begin = told.strip().partition(" ")
    return "" if state.startswith("Z") else begin.strip()


def lives(pid: int, begin: str = "") -> bool:
    """Whether the process is there that had this pid and began then. Without `begin`: whether any has this pid."""
    now = started(pid)
    return bool(now) and begin in ("", now)


def session_lives(leader: int, begin: str) -> bool:
    """Whether anything is left of the session that the process `leader`, which began then, has opened."""
    now = started(leader)
    if now and begin not in ("", now):
        return False  # the number went to somebody else, which it cannot while one of the session is there
    return bool(now) or any(True for _ in _members(leader))


def stop_session(leader: int, grace_seconds: float) -> None:
    """Ask the session's processes to end, and insist after a while. Returns when they are gone, or cannot be ended.

    SIGTERM, not SIGINT: before the step has its handlers in place, the one ends it quietly, the other with a traceback.
    """
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, number)
        if wait_until(lambda: not session_lives(leader, ""), seconds):
            return


def wait_until(condition: object, seconds: float, pause: float = 0.05) -> bool:
    """Whether `condition()` came true in time."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def _members(leader: int) -> Iterator[int]:
    """The living processes of the session, where the system tells (Linux); elsewhere, of the leader's group."""
    if sys.platform != "linux":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, 0)
            yield leader
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            fields = _stat(int(entry.name))
            if fields and fields[3] == str(leader) and fields[0] not in "ZX":
                yield int(entry.name)


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on (proc(5), field 3): [0] state, [3] session, [19] start, in ticks since boot."""
    try:
        # the program's name, which may hold anything, stands in parentheses before
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
