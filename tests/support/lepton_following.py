"""Jobs in the Lepton of the tests that wait for a sign, and a reader of their logs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steps.dispatch.executors.lepton import EXECUTOR
from steps.dispatch.job import JobRecord
from steps.errors import ExecutorError
from support.lepton_site import Site, until

WAIT = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.02)\n"


class Reader:
    """Reads a job's log in a thread of its own, and notes when each piece came."""

    def __init__(self, job: JobRecord) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._read, args=(EXECUTOR.logs(job, follow=True),), daemon=True)
        self.thread.start()

    def _read(self, pieces: Iterator[bytes]) -> None:
        try:
            for piece in pieces:
                self.pieces.append((time.monotonic(), piece))
        except ExecutorError as error:
            self.error = error

    @property
    def text(self) -> str:
        return b"".join(piece for _, piece in self.pieces).decode()

    def end(self) -> str:
        self.thread.join(30)
        assert not self.thread.is_alive(), "the log does not end"
        if self.error:
            raise self.error
        gaps = [later - earlier for (earlier, _), (later, _) in zip(self.pieces, self.pieces[1:], strict=False)]
        assert max(gaps, default=0) < 1.5  # a busy machine; an empty piece comes twice a second
        return self.text


def waiting(site: Site, before: str = "", after: str = "", **given: Any) -> tuple[JobRecord, Path]:
    """A job that writes, waits until the file `go` is there, and writes again."""
    go = site.directory / "go"
    return site.submit(f"{before}\n{WAIT.format(str(go))}\n{after}", **given), go


def say(text: str) -> str:
    return f"print({text!r}, flush=True)"


def running(site: Site, job: JobRecord, text: str = "one\n") -> None:
    until(lambda: text in b"".join(EXECUTOR.logs(job, follow=False)).decode())
