"""Ctrl-C, SIGTERM and the SIGHUP of a lost terminal: one way to be told to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stops:
    """While the `with` lasts, each of these signals is a KeyboardInterrupt in the main thread, except the ones that
    were ignored before: `nohup` and a shell's `&` mean it.

    number: the signal that came last.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._held = self._waiting = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What must not be torn in the middle: a signal in here counts at the end of it, even when it fails."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._waiting:
                self._waiting = False
                raise KeyboardInterrupt

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self._held:
            self._waiting = True
        else:
            raise KeyboardInterrupt
