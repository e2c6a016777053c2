"""Run one step as the dispatcher does: a process of its own, with a resolved configuration."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps.config import yaml12


def run_step(
    step: str, config: dict[str, Any], cwd: Path, *, fresh: bool = False, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python -m steps.<category>.<step>.step --config FILE` in `cwd`. step: "convert/hf_to_megatron".

    fresh: start a new interpreter. Otherwise the step runs in a fork of this one, which has torch imported already: the
    same code, standard streams and exit code, a second or three earlier. A GPU that is in use here cannot be used in a
    fork.
    """
    path = cwd / f"{step.rpartition('/')[2]}.yaml"
    path.write_text(yaml12.dump(config), encoding="utf-8")
    arguments = [f"steps.{step.replace('/', '.')}.step", "--config", str(path)]
    torch = sys.modules.get("torch")
    if fresh or (torch is not None and torch.cuda.is_initialized()):
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    streams = [cwd / f".{path.stem}.{name}" for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        _become(arguments, cwd, streams)
    _, status = os.waitpid(child, 0)
    stdout, stderr = (stream.read_text() for stream in streams)
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), stdout, stderr)


def _become(arguments: list[str], cwd: Path, streams: list[Path]) -> None:
    """Run the module in this process, as `python -m` does, and end it."""
    code = 99
    try:
        os.chdir(cwd)
        for number, stream in enumerate(streams, 1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
