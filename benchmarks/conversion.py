"""Merging and converting 1.7 GB of bf16 weights, against Hugging Face peft and against copying the same files.

Whole commands, from the shell's point of view: `steps run …` starts the front door, which starts the step. Each one,
`cp` too, is followed by `sync` within its time. The files that are read are in the page cache for all of them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.side_by_side import ROOT, STEPS, Comparison, Run, alternate, table, timed

MODEL_BYTES = 1_705_119_744


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    work = options.work / "conversion"
    _make_inputs(work)
    hf, base, lora, peft, out = (work / name for name in ("hf", "base", "lora", "peft", "out"))
    contender = [sys.executable, "-m"]
    merge = ["convert/merge_lora", f"lora_checkpoint={lora}", "base_megatron_path=null", f"base_hf_path={hf}",
             f"output_hf_path={out}", "sample_prompt=null"]  # fmt: skip
    there = ["convert/hf_to_megatron", f"hf_model_id={hf}", f"megatron_path={out}"]
    back = ["convert/megatron_to_hf", f"megatron_path={base}", f"hf_path={out}"]
    alone = "benchmarks.contenders.conversion_work"
    turns = {
        "cp": ["cp", "-r", str(hf), str(out)],
        "hf_to_megatron": [STEPS, "run", *there],
        "hf_to_megatron alone": [*contender, alone, "hf_to_megatron", str(hf), str(out)],
        "cp base": ["cp", "-r", str(base), str(out)],
        "megatron_to_hf": [STEPS, "run", *back],
        "megatron_to_hf alone": [*contender, alone, "megatron_to_hf", str(base), str(out)],
        "merge_lora": [STEPS, "run", *merge],
        "peft": [*contender, "benchmarks.contenders.peft_merge", str(hf), str(peft), str(out)],
    }
    found = alternate({name: _turn(command, out, work) for name, command in turns.items()}, options.rounds)
    shutil.rmtree(out, ignore_errors=True)

    def seconds(name: str) -> list[float]:
        if name.endswith("alone"):
            return [float(run.output.split()[-1]) for run in found[name]]
        return [run.seconds for run in found[name]]

    def peak(name: str) -> list[float]:
        return [run.peak_bytes / 1e6 for run in found[name]]

    rows = [
        Comparison("merge_lora", "peft", seconds("merge_lora"), seconds("peft"), "s", 1 / 2.7, 1 / 4, inverse=True),
        Comparison("its peak memory", "peft", peak("merge_lora"), peak("peft"), "MB", 0.25, 0.15, inverse=True),
        Comparison("merge_lora", "cp, sync", seconds("merge_lora"), seconds("cp"), "s", 2.0, inverse=True),
    ]
    for name, copy in (("hf_to_megatron", "cp"), ("megatron_to_hf", "cp base")):
        whole, work_alone, against = seconds(name), seconds(f"{name} alone"), seconds(copy)
        rows.append(Comparison(name, "cp, sync", whole, against, "s", 1.5, 1.2, inverse=True))
        rows.append(Comparison(f"{name}, no imports", "cp, sync", work_alone, against, "s", 1.5, 1.2, inverse=True))
    peaks = ", ".join(f"{name} {max(peak(name)):,.0f} MB" for name in ("hf_to_megatron", "megatron_to_hf"))
    return (
        f"## Merging and converting\n\n{MODEL_BYTES / 1e9:.2f} GB of bf16 weights (a random Llama of 16 layers, hidden "
        "2,048), LoRA of rank 16 on every linear. Whole commands, start and imports included, each followed by `sync`; "
        "lower is better.\n\n"
        + table([row.row() for row in rows])
        + f"\n\nPeak memory of the conversions, resident: {peaks}. Load of the machine over the last five minutes: "
        f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores. " + _FLOOR
    )  # fmt: skip


#: Why a copy is not the floor of a conversion.
_FLOOR = (
    "Where the time goes: a conversion takes two sha256 over all bytes (the base fingerprint by tensor, the "
    "artifact's digest by file) and, in torch_dist, a crc32; a merge takes three sha256. At 1.8 GB/s these are "
    "1.9 and 2.8 s of one core, a floor that copying does not have; reading into buffers and writing out of them, "
    "where `cp` copies once inside the kernel (0.5 s), is 0.9 to 1.3 s more, and importing torch 1.4 s of a merge."
)


def _make_inputs(work: Path) -> None:
    if (work / "peft").is_dir():
        return
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work)
    work.mkdir()
    timed([sys.executable, "-m", "benchmarks.contenders.conversion_inputs", str(work)], ROOT)
    timed([STEPS, "run", "convert/lora_to_hf", f"lora_checkpoint={work / 'lora'}", f"output_hf_path={work / 'peft'}",
           "base_megatron_path=null", "base_hf_path=null"], work)  # fmt: skip


def _turn(command: list[str], out: Path, work: Path) -> Callable[[], Run]:
    def turn() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return timed(["sh", "-c", f"{shlex.join(command)} && sync"], ROOT if "-m" in command else work)

    return turn
