"""How the engine tells the world what it is doing. `runtime` shows it; the engine never prints."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One long piece of work. Use as a context manager; leaving it finishes the bar."""

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        """Add `amount` units; `fields` (loss=2.1, …) are shown beside the bar. Cheap: call it per item."""

    def __enter__(self) -> Task: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """What the engine reports to."""

    def task(self, name: str, total: float | None = None, unit: str = "items", start: float = 0) -> Task:
        """Start a piece of work of `total` units (None: unknown), `start` of which an earlier run has done."""

    def log(self, message: str) -> None:
        """One line for the person who watches."""

    def metrics(self, values: Mapping[str, float]) -> None:
        """One row of metrics.jsonl (and TensorBoard, W&B where asked). Needs a key 'iteration'."""


class _SilentTask:
    def advance(self, amount: float = 1, **fields: float | str) -> None:
        pass

    def __enter__(self) -> _SilentTask:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Silent:
    """A Progress that shows nothing: for tests and library use."""

    def task(self, name: str, total: float | None = None, unit: str = "items", start: float = 0) -> Task:
        return _SilentTask()

    def log(self, message: str) -> None:
        pass

    def metrics(self, values: Mapping[str, float]) -> None:
        pass


SILENT: Progress = Silent()
