"""Our code as it is now, uncommitted changes included, for a job to run with. No git is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import steps


def sources() -> Iterator[tuple[Path, str]]:
    """The files of the package `steps` that a job may need, with their places below a directory for PYTHONPATH."""
    root = Path(steps.__file__).resolve().parent
    for path in _files(root):
        yield path, f"{root.name}/{path.relative_to(root).as_posix()}"


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.suffix not in (".pyc", ".md"):
            yield path
