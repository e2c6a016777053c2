"""Our code as it is now, uncommitted changes included, for a job to run with."""

from __future__ import annotations

import shutil
from pathlib import Path

import steps

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def write(directory: Path) -> None:
    """Copy the package `steps` into `directory`, which a PYTHONPATH can then name. No git is needed.

    Raises OSError.
    """
    source = Path(steps.__file__).resolve().parent
    # Bytes and mode bits, no owners and times: a job's copy is new, and some cluster file systems refuse the rest.
    shutil.copytree(source, directory / source.name, ignore=_LEFT_OUT, copy_function=shutil.copy)
