"""Work that is done behind the reader's and writer's back: hashing, and bringing files to the disk."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from steps.artifacts import record

T = TypeVar("T")
#: Bytes that may wait for a worker. A tensor that is larger waits alone.
WAITING_BYTES = 16 << 20
#: A file is brought to the disk in pieces of this size while it is still written.
SYNC_BYTES = 128 << 20
#: Bytes that one call writes. For larger ones the kernel takes larger pages for its cache, and a virtual machine that
#: gives free memory back to its host must ask for those again: 0.5 GB took 0.10 s in calls of 1 MB, 1.1 s of 4 MB.
WRITE_BYTES = 1 << 20


class Worker:
    """One thread that does what it is given, in order; what it holds meanwhile is bounded."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[tuple[int, Future[Any]]] = deque()
        self._bytes = 0

    def submit(self, nbytes: int, work: Callable[[], T]) -> Future[T]:
        """Queue work that holds `nbytes` of memory. Blocks while too much of it waits."""
        while self._waiting and (self._bytes + nbytes > WAITING_BYTES or self._waiting[0][1].done()):
            self._settle()
        future = self._pool.submit(work)
        self._waiting.append((nbytes, future))
        self._bytes += nbytes
        return future

    def _settle(self) -> None:
        nbytes, future = self._waiting.popleft()
        self._bytes -= nbytes
        future.result()

    def close(self) -> None:
        """Wait for everything; raises what the work raised."""
        try:
            while self._waiting:
                self._settle()
        finally:
            self._pool.shutdown()


class HashedFile:
    """A new file. While it is written one thread hashes it and another brings it to the disk.

    Use as a context manager: after it the file is on the disk, and its digest is known to `record.digest_files`, which
    need not read it again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._hashing, self._syncing = Worker(), Worker()
        self._file = path.open("wb", buffering=0)
        self._size = self._synced = 0

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Append. The memory must not change until it has been hashed: whoever made it forgets it."""
        nbytes = sum(len(part) for part in parts)
        self._hashing.submit(nbytes, lambda: self._hash(parts))
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[self._file.write(rest[:WRITE_BYTES]) :]
        self._size += nbytes
        if self._size - self._synced >= SYNC_BYTES:
            self._synced = self._size
            self._syncing.submit(0, lambda: os.fdatasync(self._file.fileno()))

    def _hash(self, parts: Sequence[bytes | memoryview]) -> None:
        for part in parts:
            self._digest.update(part)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._syncing.submit(0, lambda: os.fsync(self._file.fileno()))
            self._hashing.close()
            self._syncing.close()
        finally:
            self._file.close()
        if kind is None:
            record.remember(self._path, self._digest.hexdigest())
