"""CPU time of the front door, against importing the libraries it is built from.

Each command runs in turn with `python -c "import typer, pydantic, omegaconf, rich.table"`, as a process of its own;
what counts is user + system CPU time of the whole process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.side_by_side import STEPS, Comparison, alternate, table, timed

IMPORTS = [sys.executable, "-c", "import typer, pydantic, omegaconf, rich.table"]
COMMANDS = {
    "list": (["list"], 1.0),
    "show": (["show", "peft/megatron_bridge"], 1.0),
    "dry run": (["run", "data_prep/demo_chat", "-c", "tiny", "-d"], 1.5),
    "dry run of 5 steps": (["run", "convert/merge_lora", "-c", "tiny", "--upstream", "-d"], 1.5),
}


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    with tempfile.TemporaryDirectory() as empty:

        def cpu(command: list[str]) -> float:
            return timed(command, Path(empty)).cpu_seconds

        rows = []
        for name, (arguments, limit) in COMMANDS.items():
            turns = {"ours": lambda: cpu([STEPS, *arguments]), "imports": lambda: cpu(IMPORTS)}  # noqa: B023
            found = alternate(turns, 3 * options.rounds)
            rows.append(
                Comparison(name, "imports", found["ours"], found["imports"], "CPU s", limit, inverse=True).row()
            )
    return "## Start-up\n\nAgainst importing typer, pydantic, omegaconf and rich; three turns a round.\n\n" + table(
        rows
    )
