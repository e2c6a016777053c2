"""What a running step shows: lines for logs, progress.json for whoever watches, metrics.jsonl for programs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"
METRICS = "metrics.jsonl"
_WATCH_SECONDS = 0.2
_LINE_SECONDS = 10.0


class Reporter:
    """The engine's Progress, implemented.

    directory: where progress.json and metrics.jsonl go.
    lines:     print a line now and then; off while somebody draws a bar from progress.json.
    active:    False on every process but the first: all calls are then free.
    """

    def __init__(self, directory: Path, *, lines: bool = True, active: bool = True, sinks: Any = ()) -> None:
        self._directory, self._lines, self._active, self._sinks = directory, lines, active, tuple(sinks)

    def task(self, name: str, total: float | None = None, unit: str = "items", start: float = 0) -> _Task:
        return _Task(self, name, total, unit, start)

    def log(self, message: str) -> None:
        if self._active:
            print(message, flush=True)

    def metrics(self, values: Mapping[str, float]) -> None:
        if not self._active:
            return
        with (self._directory / METRICS).open("a") as file:
            # JSON has no NaN: null keeps the file readable for every program.
            file.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        for sink in self._sinks:
            sink.write(values)

    def close(self) -> None:
        """Finish TensorBoard and W&B, where they were asked for."""
        for sink in self._sinks:
            sink.close()

    def _show(self, task: _Task, *, done: bool = False) -> None:
        if not self._active:
            return
        state = {
            "task": task.name, "done": task.done, "total": task.total, "unit": task.unit, "fields": task.fields,
            "started": task.started, "finished": done,
        }  # fmt: skip
        beside = self._directory / f".{PROGRESS}.tmp"
        try:
            beside.write_text(json.dumps(state, default=str))
            beside.replace(self._directory / PROGRESS)
        except OSError as error:  # a full disk must not stop the work for the sake of a bar
            print(f"progress is not shown: {error}", file=sys.stderr, flush=True)
            self._active = False

    def _line(self, task: _Task, seconds: float) -> None:
        if self._active and self._lines:
            print(task.line(seconds), flush=True)


class _Task:
    def __init__(self, reporter: Reporter, name: str, total: float | None, unit: str, start: float) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.start = self.done = float(start)
        self.started = time.time()
        self.fields: dict[str, float | str] = {}
        self._reporter = reporter
        self._shown = self._told = time.monotonic()
        reporter._show(self)

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        self.done += amount
        if fields:
            self.fields.update(fields)
        now = time.monotonic()
        if now - self._shown >= _WATCH_SECONDS:
            self._shown = now
            self._reporter._show(self)
        if now - self._told >= _LINE_SECONDS:
            self._told = now
            self._reporter._line(self, time.time() - self.started)

    def line(self, seconds: float) -> str:
        """`name: 12/50 steps (24%), 3.1 steps/s, 12 s left, loss 2.41`."""
        rate = (self.done - self.start) / seconds if seconds > 0 else 0.0
        parts = [f"{self.name}: {short(self.done)}"]
        if self.total:
            parts[0] += f"/{short(self.total)}"
        parts[0] += f" {self.unit}"
        if self.total:
            parts[0] += f" ({100 * self.done / self.total:.0f}%)"
        parts.append(f"{short(rate)} {self.unit}/s")
        if self.total and 0 < self.done < self.total and rate:
            parts.append(f"{(self.total - self.done) / rate:.0f} s left")
        parts += [
            f"{key} {short(value) if isinstance(value, float | int) else value}" for key, value in self.fields.items()
        ]
        return ", ".join(parts)

    def __enter__(self) -> _Task:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._reporter._show(self, done=True)
        if kind is None:
            self._reporter._line(self, time.time() - self.started)


def short(value: float) -> str:
    """A number as people read it: 1,234 or 0.0123, four digits at most behind the point."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time as people say it, in two units at most: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    left = round(seconds)
    first = next((number for number, (_, size) in enumerate(units) if left >= size), len(units) - 1)
    told: list[str] = []
    for name, size in units[first : first + 2]:
        count, left = divmod(left, size)
        told.append(f"{count} {name}" if count or not told else "")
    return " ".join(filter(None, told))


def _finite(value: float) -> float | None:
    return value if not isinstance(value, float) or math.isfinite(value) else None
