"""Run data_prep/sft_packing in a directory and read what it wrote."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from support.chat import CHATML, save_small_tokenizer, write_jsonl
from support.run_step import run_step


def configure(cwd: Path, rows: Iterable[Any] | None = None, template: str = CHATML, **more: Any) -> dict[str, Any]:
    """A configuration for `run_step`, with its tokenizer and input in `cwd`."""
    if not (cwd / "tokenizer").exists():
        save_small_tokenizer(cwd / "tokenizer", template)
    if rows is not None:
        write_jsonl(cwd / "chat.jsonl", rows)
    return {
        "blend_path": "chat.jsonl",
        "output_dir": "packed",
        "tokenizer": {"model": "tokenizer"},
        "pack_size": 64,
        "train_ratio": 1.0,
        "valid_ratio": 0.0,
        "test_ratio": 0.0,
        "num_workers": 1,
        "max_drop_ratio": 1.0,
        **more,
    }


def pack(cwd: Path, config: dict[str, Any], expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the step; its exit code must be `expect`."""
    done = run_step("data_prep/sft_packing", config, cwd)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def report(cwd: Path) -> dict[str, Any]:
    """report.json of the result."""
    return json.loads((cwd / "packed/report.json").read_text())


def packs(cwd: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of one split, in order."""
    files = sorted((cwd / "packed/splits" / split).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def documents(cwd: Path, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(input_ids, loss_mask) of every document of a split, in order."""
    found = []
    for row in packs(cwd, split):
        starts = row["seq_start_id"]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            found.append((row["input_ids"][start:end], row["loss_mask"][start:end]))
    return found


def digests(cwd: Path) -> dict[str, str]:
    """sha256 of every file of the result but artifact.json, which holds the time."""
    root = cwd / "packed"
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "artifact.json"
    }


def as_megatron_bridge_reads(row: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, labels, mask) of each document of a row, cut as Megatron-Bridge's collate cuts them."""
    ids, mask = np.asarray(row["input_ids"]), np.asarray(row["loss_mask"])
    bounds = [*row["seq_start_id"], len(ids)]
    return [(ids[start : end - 1], ids[start + 1 : end], mask[start : end - 1]) for start, end in pairwise(bounds)]
