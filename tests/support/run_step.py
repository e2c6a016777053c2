"""Run one step as the dispatcher does: a process of its own, with a resolved configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from steps.config import yaml12


def run_step(step: str, config: dict[str, Any], cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m steps.<category>.<step>.step --config FILE` in `cwd`. step: "convert/hf_to_megatron"."""
    path = cwd / f"{step.rpartition('/')[2]}.yaml"
    path.write_text(yaml12.dump(config), encoding="utf-8")
    command = [sys.executable, "-m", f"steps.{step.replace('/', '.')}.step", "--config", str(path)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
