"""LoRA training of a 1B-class Llama on a GPU: tokens/s, memory, share of the GPU's peak. Not part of `make bench`.

    python -m benchmarks gpu

The model has the shape of Llama-3.2-1B and random weights, the data are random tokens, all of them trained.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import inputs
from benchmarks.contenders.packs import packs
from benchmarks.side_by_side import Comparison, Programs, race, table
from benchmarks.training import flops, shape, speed
from steps.artifacts.record import Record, digest_files
from steps.engine.data.packed_writer import SCHEMA

#: Compiled kernels for a first and a second shape are made in the first two turns.
WARMUP, ROWS, TOKENS, VOCABULARY = 3, 200, 4096, 128256

#: Name to module and arguments; {hf} and {base} are the model.
CONTENDERS: Programs = {
    "ours": ("ours", ("{base}", "{packed}", "--rows", "{rows}", "--compile", "never")),
    "ours, torch.compile": ("ours", ("{base}", "{packed}", "--rows", "{rows}", "--compile", "always")),
    "peft": ("transformers_peft", ("{hf}", "{packed}", "--rows", "{rows}")),
    "peft, torch.compile": ("transformers_peft", ("{hf}", "{packed}", "--rows", "{rows}", "--compile")),
    "peak": ("matmul", ("bfloat16",)),
}


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    import torch

    base, hugging_face = inputs.llama_1b(options.work)
    model = shape(base)
    speeds, memory, shares = [], [], []
    # Rows of one document need no mask: the peer's SDPA takes FlashAttention. For several documents it makes one.
    for what, rows, documents in (("one document a row of 2,048", 2, 1), ("ten documents a row of 4,096", 1, 10)):
        packed = _packed(options.work / f"packed_{documents}", TOKENS // rows, documents)
        places = {"base": base, "hf": hugging_face, "packed": packed, "rows": rows}
        found = race(CONTENDERS, places, threads=1, rounds=options.rounds, warmup=WARMUP, what=what)
        peak = [turn["flops"] / turn["seconds"] / 1e12 for turn in found.pop("peak")]
        work = sum(flops(model, pack) for pack in packs(packed, rows, seed=0)) / 1e12
        for name, turns in found.items():
            done = [work / turn["seconds"] for turn in turns]
            shares.append(Comparison(f"{what}: {name}", "matrix product", done, peak, "TFLOP/s").row())
        for mine, peer in itertools.product(*([n for n in found if n.startswith(who)] for who in ("ours", "peft"))):
            pair = found[mine], found[peer]
            speeds.append(Comparison(f"{what}: {mine}", peer, *map(speed, pair), "tok/s").row())
            sizes = ([turn["peak_bytes"] / 1e9 for turn in turns] for turns in pair)
            memory.append(Comparison(f"{what}: {mine}", peer, *sizes, "GB", inverse=True).row())
    return "\n\n".join(
        (
            "## Training on a GPU",
            f"On one {torch.cuda.get_device_name()}: LoRA of rank 16 on all linears of a Llama of 1.2B parameters "
            f"(Llama-3.2-1B's shape), bf16, {TOKENS:,} tokens a step, all of them trained. `peft` is transformers + "
            "peft with SDPA.",
            table(speeds),
            "Most memory that PyTorch reserved on the GPU:",
            table(memory),
            "Operations that a step cannot do without, against the product of two 8,192 x 8,192 matrices (the share is "
            "the MFU by what this GPU reaches):",
            table(shares),
        )
    )


def _packed(path: Path, tokens: int, documents: int) -> Path:
    """A packed_parquet of rows of `tokens` random tokens in so many documents."""
    if (path / "artifact.json").exists():
        return path
    generator = np.random.default_rng(0)
    folder = path / "splits" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for _ in range(ROWS):
        starts = [0, *sorted(generator.choice(np.arange(1, tokens), documents - 1, replace=False).tolist())]
        ids = generator.integers(VOCABULARY, size=tokens, dtype=np.int32)
        rows.append({"input_ids": ids, "loss_mask": np.ones(tokens, np.uint8), "seq_start_id": starts})
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "part.parquet")
    made = Record(type="packed_parquet", facts={"pack_size": tokens})
    made.digest, made.files = digest_files(path)
    made.write(path)
    return path
