"""Worker processes that end with their parent, however it ends.

Each worker has a pipe of its own. When the parent is killed, the pipe closes and the worker leaves; when a worker is
killed (out of memory), the parent sees the pipe close and fails, instead of waiting for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar, cast

from steps.errors import StepFailed

T = TypeVar("T")
R = TypeVar("R")


class Pool(Generic[T, R]):
    """Runs `make(*arguments)(task)` for many tasks in `number` processes. Both must be importable and picklable."""

    def __init__(self, number: int, make: Callable[..., Callable[[T], R]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # no copy of the parent's threads and locks
        self._workers: dict[Connection, Any] = {}
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        try:
            for _ in range(number):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, make, arguments), daemon=True)
                process.start()
                theirs.close()
                self._workers[ours] = process
        finally:
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before

    def run(self, tasks: Iterable[T]) -> Iterator[R]:
        """Results as they come, in any order; a task is only taken from `tasks` when a worker is free for it."""
        tasks, busy = iter(tasks), set[Connection]()
        free, exhausted = list(self._workers), False
        while True:
            while free and not exhausted:
                try:
                    task = next(tasks)
                except StopIteration:
                    exhausted = True
                else:
                    connection = free.pop()
                    self._send(connection, task)
                    busy.add(connection)
            if not busy:
                return
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                busy.discard(connection)
                free.append(connection)
                yield self._receive(connection)

    def _send(self, connection: Connection, task: T) -> None:
        try:
            connection.send(task)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection) -> R:
        try:
            ok, value = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(connection) from error
        if ok:
            return value  # type: ignore[no-any-return]
        failure, trace = value
        raise failure if isinstance(failure, StepFailed) else StepFailed(f"a worker process failed:\n{trace}")

    def _died(self, connection: Connection) -> StepFailed:
        process = self._workers[connection]
        process.join(5)
        hint = "If memory ran out, use fewer workers (num_workers)."
        return StepFailed(f"a worker process ended with exit code {process.exitcode}", hint=hint)

    def __enter__(self) -> Pool[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._workers.items():
            connection.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _work(connection: Connection, make: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...]) -> None:
    try:
        work: Callable[[T], R] | None = None
        while True:
            task = connection.recv()
            try:
                work = work or make(*arguments)
                answer: tuple[bool, Any] = (True, work(task))
            except StepFailed as error:
                answer = (False, (error, ""))
            except Exception as error:
                answer = (False, (None, traceback.format_exc() or str(error)))
            connection.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)  # the parent is gone or has had enough
