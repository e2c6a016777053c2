"""CPU time of the front door, against importing the libraries it is built from.

    python benchmarks/startup.py [--runs N]

Each command runs in turn with `python -c "import typer, pydantic, omegaconf, rich.table"`, as a process of its own;
what counts is user + system CPU time of the whole process. Prints the ratio pair by pair: median, min, max.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = [sys.executable, "-c", "import typer, pydantic, omegaconf, rich.table"]
STEPS = [str(Path(sys.executable).parent / "steps")]
COMMANDS = {
    "list": (["list"], 1.0),
    "show": (["show", "peft/megatron_bridge"], 1.0),
    "dry-run": (["run", "data_prep/demo_chat", "-c", "tiny", "-d"], 1.5),
    "dry-run, 5 steps": (["run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d"], 1.5),
}


def cpu_seconds(command: list[str], cwd: str) -> float:
    """User + system seconds of one process and its children, by the kernel's own account."""
    child = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    message = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: {message.decode()}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    print(f"{'command':<18} {'CPU s':>7} {'ratio':>6} {'min':>6} {'max':>6}  at most")
    with tempfile.TemporaryDirectory() as empty:
        for name, (arguments, limit) in COMMANDS.items():
            cpu_seconds(IMPORTS, empty), cpu_seconds([*STEPS, *arguments], empty)  # warm the file cache
            pairs = [(cpu_seconds([*STEPS, *arguments], empty), cpu_seconds(IMPORTS, empty)) for _ in range(runs)]
            ratios = [ours / theirs for ours, theirs in pairs]
            seconds = statistics.median(ours for ours, _ in pairs)
            print(
                f"{name:<18} {seconds:>7.3f} {statistics.median(ratios):>6.2f} "
                f"{min(ratios):>6.2f} {max(ratios):>6.2f}  {limit}"
            )


if __name__ == "__main__":
    main()
