"""training_jsonl on disk: a file, a glob or a directory of .jsonl, .jsonl.gz, .jsonl.zst or .parquet."""

from __future__ import annotations

import glob
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def expand(value: str) -> list[Path]:
    """The files (sorted) that a path, a glob or a directory names; a path that exists is returned as it is."""
    path = Path(value).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if path.exists():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207, the pattern may be absolute


def check(path: Path) -> str:
    """What is wrong with the data, '' when nothing is. Rows are looked at by the step, not here."""
    return ""
