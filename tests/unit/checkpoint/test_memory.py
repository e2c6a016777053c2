"""Memory is bounded by the largest tensor, not by the model: measured on processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
# Freed tensors go back to the system at once, so that the mark shows what is held and not the holes in malloc's heap.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def measure(layers, folder):
    done = subprocess.run(
        [sys.executable, "-m", "support.peak_memory", str(layers), str(folder)],
        cwd=TESTS, capture_output=True, text=True, timeout=300, env={**os.environ, **MALLOC},
    )  # fmt: skip
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_model_eleven_times_as_large_takes_no_more_memory(tmp_path):
    small, large = measure(2, tmp_path / "small"), measure(12, tmp_path / "large")
    assert large["model_mb"] - small["model_mb"] > 490
    # With two layers there is not yet one of each kind that waits to be hashed.
    assert large["peak_mb"] - small["peak_mb"] < 1.5 * large["tensor_mb"]
    # A tensor and its adapted copy, those of the layer before while they are hashed, and a buffer to spare.
    assert large["peak_mb"] - large["start_mb"] < 5.5 * large["tensor_mb"]
