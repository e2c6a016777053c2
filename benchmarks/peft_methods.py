"""Every adapter method on the tiny chain: parameters, loss, seconds a step, peak memory. Writes docs/peft-methods.md.

    python -m benchmarks.peft_methods [--inputs DIR] [--iters N] [--rounds N] [--only NAME …] [--print]

The same base (SmolLM2-135M), packed rows, seed and number of steps for each, rank 16 where there is one. Each run is a
process of its own (`steps run peft/megatron_bridge -c tiny …`); the methods take turns, `--rounds` times, and what
counts is the median over all steps of all rounds but each run's first two. Ratios are against LoRA in the same round.
Learning rates are 1e-3, or what suits the method in so short a run: nothing here ranks methods by their loss.

--inputs: a directory where the tiny chain was run (it has output/tiny/packed and output/tiny/base); made if it has not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.__main__ import write
from benchmarks.side_by_side import STEPS, timed

DOCS = Path(__file__).parents[1] / "docs" / "peft-methods.md"
CHAIN = ("data_prep/demo_chat", "data_prep/sft_packing", "convert/hf_to_megatron")
LORA = "LoRA"
#: Name in the table to what the command line says.
RUNS: dict[str, tuple[str, ...]] = {
    LORA: ("peft.type=lora",),
    "rsLoRA": ("peft.type=lora", "peft.use_rslora=true", "peft.alpha=8"),
    "LoRA+ (ratio 16)": ("peft.type=lora", "peft.lora_plus_ratio=16", "optimizer.lr=2e-4"),
    "LoRA, PiSSA start": ("peft.type=lora", "peft.init_lora_weights=pissa", "peft.alpha=16", "optimizer.lr=2e-4"),
    "LoRA, OLoRA start": ("peft.type=lora", "peft.init_lora_weights=olora", "peft.alpha=16", "optimizer.lr=2e-4"),
    "LoRA, EVA start": ("peft.type=lora", "peft.init_lora_weights=eva"),
    "canonical LoRA": ("peft.type=canonical_lora",),
    "DoRA": ("peft.type=dora",),
    "QLoRA (nf4)": ("peft.type=lora", "peft.quantization.type=nf4"),
    "LoRA on int8": ("peft.type=lora", "peft.quantization.type=int8"),
    "QDoRA (nf4)": ("peft.type=dora", "peft.quantization.type=nf4"),
    "AdaLoRA": ("peft.type=adalora", "peft.target_r=8", "optimizer.lr=1e-2"),
    "VB-LoRA": ("peft.type=vblora", "peft.dim=4", "peft.vector_length=64", "optimizer.lr=3e-3"),
    "WaveFT": ("peft.type=waveft",),
    "QR-Adaptor": (
        "peft.type=qr_adaptor",
        "peft.bits=[4,8]",
        "peft.calibration_rows=2",
        "peft.proxy_steps=1",
        "peft.population=4",
        "peft.generations=1",
        "peft.refinements=2",
    ),
}


@dataclass
class Measured:
    """What the rounds of one method came to. rss: of the largest process, bytes."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    size: int = 0


def run(arguments: list[str], place: Path) -> int:
    """Run `steps` and return the peak memory of its largest process, in bytes."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return timed([STEPS, *arguments], place, threads).peak_bytes


def train(name: str, place: Path, iters: int) -> tuple[list[float], int, dict[str, Any], int]:
    """One run of a method: seconds of its steps, peak memory, the record's facts, bytes of the adapter's tensors."""
    save = place / "output" / "bench"
    shutil.rmtree(save, ignore_errors=True)
    fixed = [
        f"train.train_iters={iters}", "train.global_batch_size=2", "train.eval_interval=0", "train.eval_iters=2",
        f"checkpoint.save={save}",
    ]  # fmt: skip
    rss = run(["run", "peft/megatron_bridge", "-c", "tiny", *fixed, *RUNS[name]], place)
    job = max((place / ".steps" / "jobs").iterdir())
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    size = sum(path.stat().st_size for path in save.glob("iter_*/*.distcp"))
    return seconds[2:], rss, json.loads((save / "artifact.json").read_text())["facts"], size


def measure(names: list[str], place: Path, iters: int, rounds: int) -> dict[str, Measured]:
    found = {name: Measured() for name in names}
    for number in range(rounds):
        lora = 0.0
        for name, measured in found.items():
            seconds, rss, measured.facts, measured.size = train(name, place, iters)
            middle = statistics.median(seconds)
            lora = middle if name == LORA else lora
            measured.seconds += seconds
            measured.ratios.append(middle / lora if lora else float("nan"))
            measured.rss.append(rss)
            print(f"round {number + 1}: {name}: {middle:.2f} s a step, {rss / 1e9:.2f} GB", flush=True)
    return found


def table(found: dict[str, Measured]) -> str:
    rows = [
        "| method | trained | share | file | valid loss: before, after | s a step | x LoRA | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, measured in found.items():
        facts = measured.facts
        trained, base = facts["trainable_parameters"], facts["parameters"]
        rows.append(
            f"| {name} | {trained:,} | {100 * trained / base:.3f} % | {measured.size / 1e6:.2f} MB "
            f"| {facts['valid_loss_first']:.3f}, {facts['valid_loss_last']:.3f} "
            f"| {statistics.median(measured.seconds):.2f} | {statistics.median(measured.ratios):.2f} "
            f"| {max(measured.rss) / 1e9:.2f} GB |"
        )
    return "\n".join(rows)


def machine() -> str:
    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{model}, {os.environ.get('OMP_NUM_THREADS', '1')} thread, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("output/bench_methods"))
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--print", action="store_true", help="only print the table")
    options = parser.parse_args()
    place = options.inputs.absolute()
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "output/tiny/base/artifact.json").is_file():
        for step in CHAIN:
            run(["run", step, "-c", "tiny"], place)
    found = measure(options.only, place, options.iters, options.rounds)
    rounds = "1 round" if options.rounds == 1 else f"{options.rounds} rounds"
    text = (
        f"Made by `python -m benchmarks.peft_methods` on {machine()}: SmolLM2-135M, {options.iters} steps of 2 rows of "
        f"512 tokens, medians over {rounds} in which the methods took turns.\n\n{table(found)}\n"
    )
    print(text)
    if not options.print:
        write("measured", text, DOCS)


if __name__ == "__main__":
    main()
