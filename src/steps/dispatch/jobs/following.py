"""Watch a job to its end, wherever it runs: its log as it grows, why it waits, a connection that breaks."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from steps.dispatch import jobs
from steps.dispatch.executors.base import Executor
from steps.dispatch.job import PENDING, RUNNING, JobRecord, Status, read_status
from steps.dispatch.jobs.screen import Screen
from steps.errors import StepsError

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_PENDING_SECONDS, _RUNNING_SECONDS = 2.0, 10.0
#: A log that has said nothing for so long after its job's end has ended too.
_SILENCE_SECONDS = 10.0
_FAILURES = (StepsError, OSError)


class Following:
    """Follows one job while the `with` lasts.

    One thread reads the log and one asks for the state, so that neither waits for the other, nor Ctrl-C, which the
    main thread gets, for either of them. A failure of theirs is told once and tried again for ever.
    skip: bytes at the beginning of the log that are not shown.
    """

    def __init__(self, executor: Executor, record: JobRecord, screen: Screen, skip: int = 0) -> None:
        self._executor, self._record, self._screen, self._skip = executor, record, screen, skip
        self._events: queue.Queue[tuple[str, str, Any]] = queue.Queue(maxsize=256)
        self._stop, self._look_now = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(name, work), daemon=True)
            for name, work in (("log", self._read), ("state", self._ask))
        ]
        self._broken: set[str] = set()
        self._told = self._complained = ""
        self._log_ended = False
        self._heard = time.monotonic()

    def __enter__(self) -> Following:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._look_now.set()
        for thread in self._threads:
            thread.join(timeout=2.0)

    def until_end(self) -> JobRecord:
        """Show what comes until the job has ended and its log was shown whole; the job as it ended."""
        while True:
            with contextlib.suppress(queue.Empty):
                self._take(*self._events.get(timeout=0.25))
            if not self._record.status.ended:
                self._heard = time.monotonic()
            silent = time.monotonic() - self._heard > _SILENCE_SECONDS
            if self._record.status.ended and (self._log_ended or silent) and self._events.empty():
                return self._record

    def _take(self, source: str, kind: str, value: Any) -> None:
        if kind == "crashed":
            raise value
        if kind == "broken":
            if not self._broken:
                self._screen.say(f"no connection to job {self._record.id} ({value}); trying again")
            self._broken.add(source)
            return
        if source in self._broken:
            self._broken.remove(source)
            if not self._broken:
                self._screen.say(f"connected to job {self._record.id} again")
        if source == "state":
            self._settle(value)
        elif kind == "end":
            self._log_ended = True
            self._look_now.set()
        elif value:
            self._heard = time.monotonic()
            self._screen.write(value)

    def _settle(self, status: Status) -> None:
        try:
            self._record = jobs.settle(self._record, status, self._executor)
        except _FAILURES as error:
            self._record = JobRecord(self._record.directory, self._record.asked, status)
            if str(error) != self._complained:
                self._screen.say(f"job {self._record.id}: {error}")
                self._complained = str(error)
        status = self._record.status
        if status.ended:
            return
        told = f"{status.state}: {status.reason}" if status.reason else status.state
        if told != self._told and (status.state == PENDING or (status.state == RUNNING and self._told)):
            self._told = told
            self._screen.say(f"job {self._record.id} is {told}")

    # In their own threads, from here on.

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._put(name, "crashed", error)

    def _put(self, source: str, kind: str, value: Any = None) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._events.put((source, kind, value), timeout=0.5)
                return

    def _read(self) -> None:
        given, pause = self._skip, _FIRST_PAUSE
        while not self._stop.is_set():
            try:
                place = 0
                with closing(self._executor.logs(self._record, follow=True)) as pieces:  # type: ignore[type-var]
                    for piece in pieces:
                        if self._stop.is_set():
                            return
                        fresh = piece[max(0, given - place) :]  # after a break it begins at the beginning again
                        place += len(piece)
                        given += len(fresh)
                        pause = _FIRST_PAUSE
                        self._put("log", "piece", fresh)
                self._put("log", "end")
                return
            except _FAILURES as error:
                self._put("log", "broken", _words(error))
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _ask(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            record = JobRecord(self._record.directory, self._record.asked, read_status(self._record.directory))
            try:
                (status,) = self._executor.look([record])
            except _FAILURES as error:
                self._put("state", "broken", _words(error))
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            pause = _FIRST_PAUSE
            self._put("state", "told", status)
            soon = status.ended or self._log_ended
            seconds = 1.0 if soon else _PENDING_SECONDS if status.state == PENDING else _RUNNING_SECONDS
            self._look_now.wait(seconds)
            self._look_now.clear()


def _words(error: BaseException) -> str:
    return error.problems[0].what if isinstance(error, StepsError) else str(error)
