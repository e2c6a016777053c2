"""packed_parquet on disk: `splits/{train,valid,test}/*.parquet`, one row a pack.

Columns: `input_ids list<int32>`, `loss_mask list<uint8>` (already shifted), `seq_start_id list<int32>`.
"""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "valid", "test")


def folder(path: Path) -> Path:
    """The directory that a path names; the model project writes `splits/train/*.parquet`, down to the files."""
    return path.parent if path.name == "*.parquet" else path


def root(path: Path) -> Path:
    """The artifact's directory, for a path to it, to its `splits`, to one split, or to all files of one split."""
    path = folder(path)
    for candidate in (path, path.parent, path.parent.parent):
        if (candidate / "splits").is_dir():
            return candidate
    return path


def shards(path: Path, split: str) -> list[Path]:
    """The Parquet files of one split, in the order they are read."""
    return sorted((root(path) / "splits" / split).glob("*.parquet"))


def check(path: Path) -> str:
    """What is wrong with the directory, '' when nothing is."""
    if not (root(path) / "splits").is_dir():
        return "it has no folder splits/"
    if not shards(path, "train"):
        return "splits/train holds no .parquet file"
    return ""
