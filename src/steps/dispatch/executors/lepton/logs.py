"""A job's output, read from its workers' logs: the first worker's, and the end of the one that made the job fail."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from steps.dispatch.executors.lepton import state
from steps.dispatch.executors.lepton.client import NotThere, Unreachable, Workspace
from steps.dispatch.executors.lepton.trailer import Splitter, Trailer

_TURN_SECONDS = 0.5  # at most between two pieces
_CHECK_SECONDS = 5.0  # of silence, after which the job's state is asked for: a dead connection is silent, too
_SILENCE_SECONDS = 600.0  # after which a connection is made anew
_LOST_SECONDS = 10.0  # without any contact, after which the reader is told
_WATCH_SECONDS, _LONGEST_PAUSE = (
    1.0,
    10.0,
)  # between two looks at a job whose first worker has ended; between connections
_QUIET_SECONDS = 0.75  # what a running job has written until now comes without longer gaps
_SETTLED_SECONDS, _SETTLED_BYTES = 5.0, 100_000  # or, where it never stops writing: after so long, so little a second
_TAIL_LINES, _TAIL_BYTES = 30, 64 * 1024


@dataclass
class Log:
    """The log of one job. trailer: what its worker, or the one that made it fail, said at its end, once it was read.

    trailer.worker is -1 when no worker has started.
    """

    workspace: Workspace
    name: str
    job_id: str
    trailer: Trailer = field(default_factory=Trailer)

    def pieces(self, *, follow: bool, expected: bool = False) -> Iterator[bytes]:
        """All of it; see `Executor.logs`. expected: the job may not be there yet. Raises ExecutorError."""
        replica = None
        for replica in self._first_worker(follow, expected):
            if replica is None:
                yield b""
        if replica is None:
            self.trailer = Trailer(worker=-1)
            return
        while replica is not None:
            splitter = Splitter(self.job_id)
            yield from self._stream(replica, splitter, follow)
            yield from filter(None, [splitter.rest()])
            self.trailer = splitter.trailer
            replica = (yield from self._restarted(replica)) if follow else None
        if self._state() == "Failed":
            yield from self._of_the_failed()

    def _state(self) -> str:
        try:
            return state.word(self.workspace.job(self.name))
        except NotThere:
            return "Deleted"

    def _first_worker(self, follow: bool, expected: bool) -> Iterator[str | None]:
        """The id of worker 0, last; before it None, again and again, while there is none yet."""
        while True:
            try:
                ended = state.word(self.workspace.job(self.name)) in state.ENDED
                replicas = self.workspace.replicas(self.name)
                if 0 in replicas:
                    yield replicas[0]
                    return
                if ended or not follow:
                    return
            except NotThere:
                if not (expected and follow):
                    return
            yield None
            time.sleep(_TURN_SECONDS)

    def _stream(self, replica: str, splitter: Splitter, follow: bool) -> Iterator[bytes]:
        """What a worker wrote, each byte once, however often the connection breaks; empty pieces in between.

        Without `follow`, of a running job: what there is now.
        """
        seen, lost, pause = 0, 0.0, _TURN_SECONDS
        while True:
            place = 0
            try:
                ended = self._state() in state.ENDED
                for piece in _Connection(self, replica).pieces(until_quiet=not (follow or ended), watch=not ended):
                    fresh = piece[max(0, seen - place) :]
                    place += len(piece)
                    seen += len(fresh)
                    lost, pause = (0.0, _TURN_SECONDS) if fresh else (lost, pause)
                    shown = splitter.feed(fresh)
                    if shown or not piece:
                        yield shown
                if ended or not follow or splitter.trailer.ended_at:
                    return
            except NotThere:
                return  # the worker was deleted, its log with it
            except Unreachable:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _LOST_SECONDS:
                    raise
            yield from _nothing(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)  # each time the log is read from its beginning

    def _restarted(self, replica: str) -> Generator[bytes, None, str | None]:
        """Wait for the end of a job whose first worker has ended: others may go on, or Lepton may start it again, where
        it had made room for another job. Returns the id of the new first worker; None at the end.
        """
        while self._state() not in state.ENDED:
            now = self.workspace.replicas(self.name).get(0, replica)
            if now != replica:
                return now
            yield from _nothing(_WATCH_SECONDS)
        return None

    def _of_the_failed(self) -> Iterator[bytes]:
        """The last lines of the worker that made the job fail, where that is not the first."""
        if self.trailer.exit_code and not self.trailer.worker:
            return
        first = self.trailer
        for index, replica in sorted(self.workspace.replicas(self.name).items()):
            if not index or (first.exit_code and index != first.worker):
                continue
            tail, trailer = self._tail(replica)
            if trailer.exit_code or (first.ended_at and not trailer.ended_at):
                trailer.summary, trailer.metrics, trailer.worker = first.summary, first.metrics, index
                self.trailer = trailer
                yield f"--- the last lines of worker {index}, which failed first ---\n".encode() + tail
                return

    def _tail(self, replica: str) -> tuple[bytes, Trailer]:
        splitter, tail = Splitter(self.job_id), b""
        with contextlib.suppress(NotThere):
            for piece in self.workspace.log(self.name, replica, _SILENCE_SECONDS):
                tail = (tail + splitter.feed(piece))[-_TAIL_BYTES:]
        lines = (tail + splitter.rest()).splitlines(keepends=True)
        return b"".join(lines[-_TAIL_LINES:]), splitter.trailer


def _nothing(seconds: float) -> Iterator[bytes]:
    """Empty pieces, for so long."""
    due = time.monotonic() + seconds
    while time.monotonic() < due:
        yield b""
        time.sleep(min(_TURN_SECONDS, seconds))


class _Connection:
    """One reading of a worker's log, by a thread of its own: whoever waits for it can do something else in between."""

    def __init__(self, log: Log, replica: str) -> None:
        self._log, self._replica = log, replica
        self._queue: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=256)
        self._closed = threading.Event()

    def pieces(self, *, until_quiet: bool, watch: bool) -> Iterator[bytes]:
        """Raises Unreachable where it breaks off. until_quiet: only what there is now. watch: whether the job runs."""
        threading.Thread(target=self._read, daemon=True).start()
        began = heard = checked = time.monotonic()
        recent: list[tuple[float, int]] = []
        try:
            while True:
                try:
                    piece = self._queue.get(timeout=_TURN_SECONDS)
                except queue.Empty:
                    piece = b""
                if piece is None:
                    return
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                now = time.monotonic()
                if piece:
                    heard = checked = now
                    recent = [(at, size) for at, size in recent if now - at < 1] + [(now, len(piece))]
                if until_quiet and now - heard >= _QUIET_SECONDS:
                    return
                if until_quiet and now - began > _SETTLED_SECONDS and sum(s for _, s in recent) < _SETTLED_BYTES:
                    return
                if watch and now - checked >= _CHECK_SECONDS:
                    checked = now
                    if self._log._state() in state.ENDED and self._queue.empty():
                        return
        finally:
            self._closed.set()

    def _read(self) -> None:
        try:
            for piece in self._log.workspace.log(self._log.name, self._replica, _SILENCE_SECONDS):
                if not self._put(piece):
                    return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, item: bytes | Exception | None) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_TURN_SECONDS)
                return True
        return False
