"""The tiny chain, run once for all tests that look at what it made."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Demo:
    """What the demo's one command left. peak_bytes: of its largest process."""

    directory: Path
    output: str
    peak_bytes: int


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    """The demo's one command in an empty directory."""
    directory = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "steps", "run", "convert/merge_lora", "-c", "tiny", "--upstream"]
    with (directory / "output.txt").open("w") as file:
        child = subprocess.Popen(command, cwd=directory, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)  # of the child and of all it waited for
    output = (directory / "output.txt").read_text()
    assert status == 0, output
    return Demo(directory, output, usage.ru_maxrss * 1024)
