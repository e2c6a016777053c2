"""The expected peak of `steps run … -d` against what the kernel counts in the run itself.

Two models, LoRA of rank 16 on all linears, packed rows of 2,048 tokens, by precision, recomputation and rows at a time.
Measured is the largest resident set (VmHWM) of any process of the command: that of the step. Bytes are no matter of
luck, so each run is made once, for a few optimizer steps of two rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

from benchmarks.side_by_side import STEPS, table, timed

TOKENS, ITERS = 2048, 3
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
#: Name in the table to the checkpoint_megatron.
MODELS = {"Llama, 57M": "base57", "SmolLM2-135M": "base135"}


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    work = options.work / "estimate"
    _inputs(work)
    rows, ratios = [], []
    every = itertools.product(MODELS.items(), ("float32", "bfloat16"), ("null", "full"), (1, 2))
    for (name, base), precision, recompute, micro in every:
        settings = [
            f"checkpoint.pretrained_checkpoint={base}", f"train.precision={precision}",
            f"train.recompute_granularity={recompute}", f"train.micro_batch_size={micro}",
        ]  # fmt: skip
        expected, measured = _pair(work, settings)
        ratios.append(measured / expected)
        cells = [name, precision, recompute, str(micro), _mb(expected), _mb(measured), f"{ratios[-1]:.2f}"]
        print(" | ".join(cells), flush=True)
        rows.append(cells)
    within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    head = ("model", "precision", "recomputation", "rows at a time", "expected", "measured", "measured / expected")
    return (
        "## Memory estimate\n\nThe peak that `steps run … -d` expects, against the largest resident set of the run: "
        f"LoRA, rank 16 on all linears, rows of {TOKENS:,} tokens, {ITERS} optimizer steps of two rows, one thread. "
        f"**Within 15 %: {within} of {len(ratios)}** (ratios {min(ratios):.2f} to {max(ratios):.2f}).\n\n"
        + table(rows, head)
    )


def _pair(work: Path, settings: list[str]) -> tuple[int, int]:
    """Bytes: expected by a dry run, measured of the run."""
    shutil.rmtree(work / "lora", ignore_errors=True)
    command = [
        STEPS, "run", "peft/megatron_bridge", "-c", "tiny", "dataset.nano3_packed_sft_dir=packed",
        "checkpoint.save=lora", f"recipe.seq_length={TOKENS}", "peft.dim=16", "train.global_batch_size=2",
        f"train.train_iters={ITERS}", "train.eval_iters=0", "scheduler.lr_warmup_iters=0", *settings,
    ]  # fmt: skip
    told = json.loads(timed([*command, "-d", "--json"], work, ENVIRONMENT).output)
    return told["steps"][0]["account"]["memory_bytes"], timed(command, work, ENVIRONMENT).peak_bytes


def _inputs(work: Path) -> None:
    """The packed rows and the two bases, made once."""
    work.mkdir(parents=True, exist_ok=True)
    chain: dict[str, list[str]] = {
        "chat": ["data_prep/demo_chat", "output_dir=chat", "max_conversations=300"],
        "packed": ["data_prep/sft_packing", "blend_path=chat", "output_dir=packed", f"pack_size={TOKENS}"],
        "base135": ["convert/hf_to_megatron", "megatron_path=base135"],
        "base57": ["convert/hf_to_megatron", "hf_model_id=llama57", "megatron_path=base57"],
    }
    for made, arguments in chain.items():
        if not (work / made / "artifact.json").is_file():
            if made == "base57":
                _random_llama(work / "llama57", work / "base135")
            timed([STEPS, "run", arguments[0], "-c", "tiny", *arguments[1:]], work)


def _random_llama(path: Path, other: Path) -> None:
    """A Llama of 57M random parameters with the tokenizer of a checkpoint_megatron, as transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(path)
    for file in (other / "iter_0000000" / "tokenizer").iterdir():
        shutil.copy(file, path)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
