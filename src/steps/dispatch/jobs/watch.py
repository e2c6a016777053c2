"""Show a running job: its log as it grows and, on a terminal, a bar from its progress.json."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from steps.dispatch.render import four_digits

_BAR_SECONDS = 0.2


class Watch:
    """Follows one job's directory. `update` often; `close` when the job has ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = (directory / "log").open("rb")
        # A character may be half written when we look.
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self.draws_bars = sys.stdout.isatty()
        self._bars: Any = None
        self._shown: tuple[str, float] | None = None
        self._row: Any = None
        self._looked = 0.0

    def update(self) -> None:
        """Print what is new in the log and move the bar."""
        text = self._decode(self._log.read())
        if text:
            if self._bars is not None:
                self._bars.console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, end="", flush=True)
        if self.draws_bars and time.monotonic() - self._looked > _BAR_SECONDS:
            self._looked = time.monotonic()
            self._draw()

    def close(self) -> None:
        """Print the rest; leave the terminal as it was."""
        self.update()
        if self._bars is not None:
            self._draw()
            self._bars.stop()
        self._log.close()

    def _draw(self) -> None:
        try:
            state = json.loads((self._directory / "progress.json").read_text())
        except (OSError, ValueError):
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        task = (state["task"], state["started"])
        if task != self._shown:
            self._shown = task
            self._row = self._bars.add_task(
                state["task"], total=state["total"], unit=state["unit"], amount="", fields=""
            )
        fields = "  ".join(f"{key} {_short(value)}" for key, value in state["fields"].items())
        amount = _short(state["done"]) + (f"/{_short(state['total'])}" if state["total"] else "")
        done = state["total"] or state["done"] if state["finished"] else state["done"]
        self._bars.update(self._row, completed=done, amount=amount, fields=fields)
        if state["finished"]:
            with contextlib.suppress(KeyError):
                self._bars.stop_task(self._row)


def _short(value: Any) -> str:
    return four_digits(value) if isinstance(value, float) else str(value)


def _bars() -> Any:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )  # fmt: skip
