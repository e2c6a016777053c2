"""Servers that tests start: ending them, finding what they left, and cleaning up after a test run that was killed.

Run as a program, it is the guard: it waits for the end of its standard input and then does the cleaning. The standard
library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


class Guard:
    """Kills the members of a server's directory and removes it if this process dies without doing so, even by SIGKILL.

    marks: as for members_of.
    """

    def __init__(self, directory: Path, *marks: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(directory), *marks],
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def dismiss(self) -> None:
        """The directory was cleaned up in the ordinary way."""
        self._process.communicate("dismissed")


def stop_process(process: subprocess.Popen[bytes], patience: float = 5) -> None:
    """SIGTERM, and SIGKILL when that was not heard after `patience` seconds."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill(pids: Iterable[int]) -> None:
    """SIGKILL each that still lives, the older first: a script would put down how a command of its own died."""
    for pid in sorted(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> set[int]:
    return {child for child, parent in _parents().items() if parent == pid}


def members_of(directory: Path, *marks: str) -> set[int]:
    """Processes that belong to a server: those that hold a file or a unix socket below `directory` open, those whose
    environment has, for every mark, a variable that begins with it, and all that descend from these.

    marks: such as "SLURM_JOB_ID=". None: the environment does not count. This process and those above it are never
    members, nor are other users' processes.
    """
    parents = _parents()
    sockets = _unix_sockets(directory)
    found = {pid for pid in parents if _holds(pid, directory, sockets) or _is_marked(pid, marks)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - _lineage(parents)


def _parents() -> dict[int, int]:
    """Process id -> its parent's, for every process there is now."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # the program's name, which may hold anything, is in parentheses before the state and the parent
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return parents


def _lineage(parents: dict[int, int]) -> set[int]:
    pids, pid = set(), os.getpid()
    while pid and pid not in pids:
        pids.add(pid)
        pid = parents.get(pid, 0)
    return pids


def _unix_sockets(directory: Path) -> set[str]:
    """The sockets bound below `directory`, named as /proc/PID/fd names them."""
    bound = re.findall(rf"(\d+) {re.escape(str(directory))}/", Path("/proc/net/unix").read_text())
    return {f"socket:[{inode}]" for inode in bound}


def _holds(pid: int, directory: Path, sockets: set[str]) -> bool:
    for descriptor in _listing(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target in sockets or target.startswith(f"{directory}/"):
                return True
    return False


def _listing(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:  # it ended meanwhile, or is another user's
        return []


def _is_marked(pid: int, marks: tuple[str, ...]) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return bool(marks) and all(any(line.startswith(mark.encode()) for line in variables) for mark in marks)


def _guard(directory: Path, *marks: str) -> None:
    if sys.stdin.read() != "dismissed":
        kill(members_of(directory, *marks))
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]), *sys.argv[2:])
