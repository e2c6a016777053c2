"""The tiny chain, run once for all tests that look at what it made."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from support.steps import steps


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """The directory in which the demo's one command ran, what it printed, and its seconds."""
    directory = tmp_path_factory.mktemp("demo")
    started = time.monotonic()
    done = steps("run", "convert/merge_lora", "-c", "tiny", "--upstream", cwd=directory, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done, time.monotonic() - started
