"""A Slurm job's output while it comes, and what is left to do when it has ended: bring its files here, or end it.

Each look at the log is complete in itself and goes on at an offset, so that a connection which breaks loses nothing and
repeats nothing.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from steps.dispatch import jobs
from steps.dispatch.executors.slurm import layout
from steps.dispatch.executors.slurm.shell import Shell
from steps.dispatch.executors.slurm.state import Found, environment, find, look
from steps.dispatch.job import LOST, MASK, SUBMITTING, JobRecord
from steps.errors import ExecutorError

T = TypeVar("T")

#: The runtime's files beside the log that are worth having here.
FETCHED = ("log", "metrics.jsonl", "summary.json", "progress.json")
_PIECE = 4 << 20
_IDLE = 0.5
#: Seconds between two looks at the log: the files are here, or behind ssh.
_POLL_HERE, _POLL_THERE, _SHORTEST_PAUSE = 0.5, 1.0, 0.3
#: Seconds between two questions to Slurm, growing; and between two tries to reach a host that was lost.
_FIRST_QUESTION, _LONGEST_QUESTION = 3.0, 15.0
_LONGEST_RETRY, _GIVE_UP = 30.0, 3600.0
_CANCEL_SECONDS = 15.0
_LATER = "Try again later; `scontrol ping` tells whether the controller is up."


@dataclass(frozen=True)
class Glance:
    """One look at a file in a job's directory: bytes from the offset on; its size, None where there is no such file.

    ended: whether the job had left its exit code before this look.
    """

    data: bytes
    size: int | None
    ended: bool


def logs(job: JobRecord, *, follow: bool) -> Iterator[bytes]:
    """The job's log from its beginning. follow: until the job has ended; an empty piece comes twice a second.

    A log that got shorter starts again. Raises ExecutorError when the cluster cannot be reached at first, or for an
    hour; what else breaks while following is tried again.
    """
    shell, found = Shell.of(environment(job)), find(job)
    if not follow:
        for glance in _all_of(shell, found, "log"):
            yield glance.data
        return
    questions = _Questions(job)
    pause = _POLL_HERE if shell.here else _POLL_THERE
    offset, settled, failing_since, retry = 0, False, 0.0, pause
    reached = False
    while True:
        looked = time.monotonic()
        try:
            glance = yield from _waiting(lambda at=offset: _glance(shell, found, "log", at))  # type: ignore[misc]
        except ExecutorError:
            failing_since = failing_since or time.monotonic()
            if not reached or time.monotonic() - failing_since > _GIVE_UP:
                raise
            yield from _pause(retry)
            retry = min(2 * retry, _LONGEST_RETRY)
            continue
        reached, failing_since, retry = True, 0.0, pause
        if glance.size is not None and glance.size < offset:
            offset = 0
            continue
        offset += len(glance.data)
        if glance.data:
            yield glance.data
            settled = False
            if offset < (glance.size or 0):
                continue
        ended = glance.ended or (yield from questions.ended())
        if ended and settled:
            return
        settled = ended  # looked at once more: a network file system may show the last bytes later than the end
        yield from _pause(max(pause - (time.monotonic() - looked), _SHORTEST_PAUSE))


def fetch(job: JobRecord) -> None:
    """Bring the log and the runtime's files of an ended job here, each whole or not at all, and remove its secrets.

    Those of a job that is lost and was never seen running stay: should somebody else know of it, it needs them yet.
    """
    shell, found = Shell.of(environment(job)), find(job)
    if not (shell.here and _same(found.directory, job.directory)):
        for name in FETCHED:
            beside = job.directory / f".{name}.{os.getpid()}.tmp"
            try:
                with beside.open("wb") as file:
                    size = None
                    for glance in _all_of(shell, found, name):
                        file.write(glance.data)
                        size = glance.size
                if size is not None:
                    beside.replace(job.directory / name)
            finally:
                beside.unlink(missing_ok=True)
    if job.status.state != LOST or job.status.started_at:
        _remove_secrets(job, shell, found)


def cancel(job: JobRecord) -> None:
    """End a job, waiting or running, and wait a little until it is gone. Raises ExecutorError when Slurm refuses, and
    for a job that is on its way into the queue and does not come there."""
    if job.note.startswith(jobs.UNREACHABLE):  # it was asked a moment ago, and each silence takes many seconds
        raise ExecutorError(f"{job.id} cannot be cancelled: {job.note.removeprefix(jobs.UNREACHABLE)}", hint=_LATER)
    shell, found = Shell.of(environment(job)), find(job)
    status = look([job])[0]
    due = time.monotonic() + _CANCEL_SECONDS
    while status.state == LOST and job.status.reason == SUBMITTING:  # on its way into the queue: nothing to end yet
        if time.monotonic() > due:
            hint = "Try again in a minute: then it is in the queue, or its submission has failed."
            raise ExecutorError(f"{job.id} is being submitted by another process at this moment", hint=hint)
        time.sleep(_IDLE)
        status = look([job])[0]
    if not status.ended:
        # By number and name together: should the number be another job's by now, nothing happens to that one.
        number = status.handle.get("slurm_job_id", "")
        result = shell.run(f'scancel --user="$(id -un)" --name={shlex.quote(found.name)} {number}')
        if result.returncode and not look([job])[0].ended:
            raise ExecutorError(f"{job.id} cannot be cancelled: {result.stderr.strip()}", hint=_LATER)
        deadline = time.monotonic() + _CANCEL_SECONDS
        while not look([job])[0].ended and time.monotonic() < deadline:
            time.sleep(_IDLE)
    _remove_secrets(job, shell, found)


def _remove_secrets(job: JobRecord, shell: Shell, found: Found) -> None:
    """Asks nothing where there were none: a shell for each of many jobs takes its time."""
    if MASK in job.asked.get("environment", {None: MASK}).values():
        shell.ask(f"rm -f -- {shlex.quote(found.secrets)}")


class _Questions:
    """Asks Slurm whether the job has ended, ever less often; where Slurm does not answer, the job goes on."""

    def __init__(self, job: JobRecord) -> None:
        self._job = job
        self._every = _FIRST_QUESTION
        self._next = time.monotonic() + self._every
        self._answer = False

    def ended(self) -> Generator[bytes, None, bool]:
        if not self._answer and time.monotonic() >= self._next:
            with suppress(ExecutorError):
                self._answer = (yield from _waiting(lambda: look([self._job])))[0].ended
            self._every = min(self._every * 1.5, _LONGEST_QUESTION)
            self._next = time.monotonic() + self._every
        return self._answer


def _glance(shell: Shell, found: Found, name: str, offset: int) -> Glance:
    """What stands in the file from `offset` on, at most a few MB. Whether the job has ended is looked at first."""
    if shell.here:
        directory = Path(found.directory)
        ended = (directory / layout.EXIT_CODE).exists()
        try:
            with (directory / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(offset)
                return Glance(file.read(_PIECE) if size > offset else b"", size, ended)
        except FileNotFoundError:
            return Glance(b"", None, ended)
        except OSError as error:
            raise ExecutorError(f"{directory / name}: {error.strerror}") from error
    answer = shell.ask(
        f"""\
cd {shlex.quote(found.directory)} 2>/dev/null || {{ echo "no no"; exit 0; }}
[ -f {layout.EXIT_CODE} ] && ended=yes || ended=no
size=no
[ -f {name} ] && size=$(wc -c <{name})
echo "$ended" $size
[ "$size" = no ] || tail -c +{offset + 1} {name} | head -c {_PIECE}
""",
    )
    facts, _, data = answer.stdout.partition(b"\n")
    left, there = facts.split()
    return Glance(data, None if there == b"no" else int(there), left == b"yes")


def _all_of(shell: Shell, found: Found, name: str) -> Iterator[Glance]:
    """A file as it is now, piece by piece."""
    offset = 0
    while True:
        glance = _glance(shell, found, name, offset)
        yield glance
        offset += len(glance.data)
        if not glance.data or glance.size is None or offset >= glance.size:
            return


def _same(directory: str, here: Path) -> bool:
    try:
        return Path(directory).samefile(here)
    except OSError:
        return False


def _pause(seconds: float) -> Iterator[bytes]:
    """Sleep, with empty pieces."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _IDLE))
        yield b""


def _waiting(work: Callable[[], T]) -> Generator[bytes, None, T]:
    """The result of `work`, with empty pieces while it takes its time (a host or a controller that does not answer)."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_IDLE)
        if thread.is_alive():
            yield b""
    if failure:
        raise failure[0]
    return result[0]
