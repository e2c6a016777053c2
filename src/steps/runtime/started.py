"""A step that starts other steps does it as a person would: by the command line, each in a directory of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steps.engine.comparison.running import Ended

#: What a child that was told to stop may take for it.
_PATIENCE_SECONDS = 30


class Starter:
    """Starts steps and waits for them; whatever ends this one ends them too.

    profile: `steps run … -r PROFILE`; None: on this machine.   parallel: how many run at a time, to divide the
    processors among them.
    """

    def __init__(self, profile: str | None, env_file: str | None, parallel: int) -> None:
        self._options = [*(["-r", profile] if profile else []), *(["--env-file", env_file] if env_file else [])]
        self._environment = dict(os.environ)
        if profile is None and parallel > 1 and "OMP_NUM_THREADS" not in os.environ:
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // parallel))
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def refused(self, step: str, config: Path, directory: Path) -> str:
        """What a dry run of it in `directory` finds wrong; '' for nothing. So a profile is looked at before any run."""
        command = [*self._command(step, config), "-d"]
        done = subprocess.run(
            command, cwd=directory, env=self._environment, capture_output=True, text=True, check=False
        )
        return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""

    def _command(self, step: str, config: Path) -> list[str]:
        return [sys.executable, "-m", "steps", "run", step, "-c", str(config), *self._options]

    def start(self, step: str, config: Path, directory: Path) -> Ended:
        """`steps run STEP -c CONFIG` in `directory`; its output goes to STEP.log there."""
        log = directory / f"{step.replace('/', '-')}.log"
        command = self._command(step, config)
        with log.open("wb") as output:
            with self._lock:
                if self._stopped:
                    return Ended(130, "stopped before it began")
                child = subprocess.Popen(
                    command, cwd=directory, env=self._environment, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self._children.add(child)
            code = child.wait()
        with self._lock:
            self._children.discard(child)
        return Ended(code, _last_error(log) if code else "")

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """When the body is left by an exception (Ctrl-C, SIGTERM), stop what still runs and wait for it."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._stopped = True
                children = list(self._children)
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGINT)
            for child in children:
                try:
                    child.wait(_PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
            raise


def _last_error(log: Path) -> str:
    """The last `error: …` of a log, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1][:300]
