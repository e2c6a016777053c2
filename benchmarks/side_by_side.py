"""Contenders take turns, so that what a shared machine does to one it does to the other; ratios are of one round.

Two kinds. A `Contender` is a process that stays and does one piece of work each time it is asked (a training step, a
file packed), so that what it needed to start is not in the figures. `timed` runs a whole command, start included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: The steps command of the environment that runs the benchmark.
STEPS = str(Path(sys.executable).parent / "steps")
# A checkout is to start as an installed package does: with the compiled modules that Python keeps. Where this is set
# none are written, and each of our commands would compile all of our source anew (a third of a dry run).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@dataclass(frozen=True)
class Run:
    """One command: wall and CPU seconds (its children's too), peak bytes of its largest process, what it printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def timed(command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. Exits with its output if it fails: a benchmark of a failure measures nothing."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            list(command), cwd=cwd, env={**os.environ, **(environment or {})}, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


class Contender:
    """A program of benchmarks/contenders, started and waiting for its turns."""

    def __init__(
        self, name: str, arguments: Sequence[str], *, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """name: the module under benchmarks/contenders."""
        answers, mine = os.pipe()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it lives as long as this
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.contenders.{name}", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "BENCH_ANSWERS": str(mine),
                **(environment or {}),
            },
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(mine,),
            text=True,
        )
        os.close(mine)
        self._answers = os.fdopen(answers)
        self._name = name
        began = time.perf_counter()
        self._answer()
        #: Seconds from the start of the process until it could take its first turn.
        self.start_seconds = time.perf_counter() - began

    def turn(self) -> dict[str, Any]:
        """Let it do its work once. Returns seconds, cpu_seconds, peak_bytes and what it told besides."""
        self._tell("go")
        answer = self._answer()
        self._answer()  # ready again
        return answer

    def close(self) -> None:
        """Let it go."""
        self._tell("end")
        self._process.wait(timeout=60)
        self._answers.close()

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"the contender {self._name} ended:\n{self._log.read()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def alternate(turns: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 1) -> dict[str, list[Any]]:
    """What each turn returned, by name and round; every round calls each once, in order. Warm-ups are left out."""
    found: dict[str, list[Any]] = {name: [] for name in turns}
    for number in range(-warmup, rounds):
        for name, turn in turns.items():
            result = turn()
            if number >= 0:
                found[name].append(result)
    return found


#: Of contenders by name: module and arguments, in which {place} stands for something of each run.
Programs = Mapping[str, tuple[str, Sequence[str]]]


def race(
    programs: Programs, places: Mapping[str, Any], *, threads: int, rounds: int, warmup: int, what: str
) -> dict[str, list[dict[str, Any]]]:
    """Start the contenders, let them take turns, end them; as `alternate`. Prints a line for each.

    what: the race, in these lines.
    """
    contenders = {
        name: Contender(module, [argument.format(**places) for argument in arguments], threads=threads)
        for name, (module, arguments) in programs.items()
    }
    found = alternate({name: one.turn for name, one in contenders.items()}, rounds, warmup=warmup)
    for one in contenders.values():
        one.close()
    for name, turns in found.items():
        print(f"{what}: {name}: {statistics.median(turn['seconds'] for turn in turns):.4g} s", flush=True)
    return found


@dataclass(frozen=True)
class Comparison:
    """One line of a table: `ours` and `theirs` by round, in `unit`, and what was promised of the ratio.

    inverse: ours / theirs is to be small (memory, seconds) instead of large (tokens/s).
    owed, goal: bounds of the median ratio; None where nothing was promised.
    """

    what: str
    against: str
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str
    owed: float | None = None
    goal: float | None = None
    inverse: bool = False

    @property
    def ratios(self) -> list[float]:
        """ours / theirs, round by round."""
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]

    def row(self) -> list[str]:
        """Its cells, for `table`."""
        ratios = self.ratios
        middle = statistics.median(ratios)
        return [
            self.what, self.against, f"{figure(statistics.median(self.ours))} {self.unit}",
            f"{figure(statistics.median(self.theirs))} {self.unit}",
            f"**{middle:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})", self._bound(self.owed, middle),
            self._bound(self.goal, middle),
        ]  # fmt: skip

    def _bound(self, bound: float | None, ratio: float) -> str:
        if bound is None:
            return ""
        met = ratio <= bound if self.inverse else ratio >= bound
        return f"{'≤' if self.inverse else '≥'} {bound:g}: {'yes' if met else '**no**'}"


HEADER = ("what", "against", "ours", "theirs", "ratio (min to max)", "owed", "goal")


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(value: float) -> str:
    """Three significant digits, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
