"""A throw-away step for tests of the dispatcher, and the `steps` command as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from steps.manifest import Manifest


def fake_step(folder: Path, **configs: str) -> Manifest:
    """A manifest whose config folder holds the given YAML texts."""
    (folder / "config").mkdir(parents=True, exist_ok=True)
    for name, text in configs.items():
        (folder / "config" / f"{name}.yaml").write_text(text)
    return Manifest(id="test/fake", name="Fake", category="test", description="", folder=folder)


def steps(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `steps ARGUMENTS` in `cwd`, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "steps", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
