"""The contender's side of benchmarks/side_by_side.py: work is done when it is asked for, and timed here."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from steps.machine import peak_bytes

_ANSWERS = "BENCH_ANSWERS"


def _gpu_peak_bytes() -> int:
    """The most that this process has reserved of its GPU; 0 without one."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch is not None and torch.cuda.is_available() else 0


class Turns:
    """One contender's turns.

    turns = Turns()
    while turns.asked():        # blocks until it is this contender's turn; False at the end
        ...                     # the work
        turns.done(tokens=n)    # its seconds are measured from `asked` to here
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(int(os.environ[_ANSWERS]), "w")
        self._began = (0.0, 0.0)

    def asked(self) -> bool:
        """Say that everything before is done, and wait."""
        self._say({"ready": True})
        go = sys.stdin.readline().strip() == "go"
        self._began = (time.perf_counter(), time.process_time())
        return go

    def done(self, **facts: Any) -> None:
        """End of the turn. facts: numbers of the work, whatever the benchmark wants to know."""
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._say({"seconds": wall, "cpu_seconds": cpu, "peak_bytes": _gpu_peak_bytes() or peak_bytes(), **facts})

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)
