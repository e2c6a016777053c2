"""The last lines of a worker's log, which its script writes for us: `MARK summary JSON` and `MARK metrics JSON`, a line
each, then `MARK exit CODE WORKER STARTED ENDED`, or `MARK stopped …` by a worker that was told to end.

A job's files lie on storage that only its workers see, and the API knows no exit code: the log is the only way out.
Nothing of a step's own comes after the first mark, which may stand behind a last line without an end.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def mark(job_id: str) -> str:
    """What these lines begin with; the job's own id keeps it apart from whatever else a log holds."""
    return f"[steps {job_id}]"


@dataclass
class Trailer:
    """What a worker said at its end. exit_code None: it was stopped, or did not get so far (killed, its node was lost).

    worker: index of the worker whose exit code it is, the first that failed. Times: UTC, ISO; '' when it said nothing.
    """

    exit_code: int | None = None
    worker: int = 0
    started_at: str = ""
    ended_at: str = ""
    summary: str = ""
    metrics: str = ""


@dataclass
class Splitter:
    """Divides the bytes of a log, however they are cut, into what people see and the trailer."""

    job_id: str
    _held: bytes = b""
    _trailer: bytes = b""
    _found: bool = False
    _mark: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._mark = mark(self.job_id).encode()

    def feed(self, piece: bytes) -> bytes:
        """What of it can be shown now; an end that could be the beginning of the mark is held back."""
        if self._found:
            self._trailer += piece
            return b""
        data = self._held + piece
        at = data.find(self._mark)
        if at >= 0:
            self._found, self._held, self._trailer = True, b"", data[at:]
            return data[:at]
        keep = next(
            (n for n in range(min(len(self._mark) - 1, len(data)), 0, -1) if self._mark.startswith(data[-n:])), 0
        )
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def rest(self) -> bytes:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, b""
        return held

    @property
    def trailer(self) -> Trailer:
        """What has been said so far. Lines that make no sense are left out."""
        result = Trailer()
        for line in self._trailer.decode(errors="replace").splitlines():
            kind, _, text = line.removeprefix(mark(self.job_id)).strip().partition(" ")
            words = text.split()
            if kind == "summary":
                result.summary += text + "\n"
            elif kind == "metrics":
                result.metrics += text + "\n"
            elif kind in ("exit", "stopped") and len(words) == 4 and words[0].isdecimal() and words[1].isdecimal():
                result.exit_code = int(words[0]) if kind == "exit" else None
                result.worker = int(words[1])
                result.started_at, result.ended_at = words[2:]
        return result
