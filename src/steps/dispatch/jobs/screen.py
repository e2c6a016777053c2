"""Where a job's output is shown: as the bytes they are, with our own lines beside them."""

from __future__ import annotations

import os
import sys


class Screen:
    """Standard output for what the job says, standard error for what we say of it.

    A screen that cannot be written to (`| head`, a full disk) is closed and the rest is swallowed: the job goes on.
    """

    def __init__(self) -> None:
        self.closed = False
        self._in_line = False  # the job's last line has no end yet

    def write(self, piece: bytes) -> None:
        """Show a piece of the log. Bytes, not text: half a character or half a line is completed by the next piece."""
        if self.closed or not piece:
            return
        try:
            sys.stdout.flush()
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        except (OSError, ValueError):
            self.closed = True
            _discard_rest(1)
        self._in_line = not piece.endswith(b"\n")

    def say(self, text: str) -> None:
        """One line of ours."""
        # On a terminal both meet: never in the middle of a line of the job's.
        apart = "\n" if self._in_line and sys.stdout.isatty() else ""
        self._in_line = self._in_line and not apart
        try:
            print(f"{apart}{text}", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            _discard_rest(2)


def _discard_rest(descriptor: int) -> None:
    """What is still in a buffer goes nowhere, instead of failing once more at the end of the process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
