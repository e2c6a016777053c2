"""LoRA training, rank 16 on all linears, packed rows of 2,048 tokens: tokens/s, memory, share of the machine's peak.

Every contender stays in a process of its own and trains on the same rows in the same order (TRL packs their documents
itself); a turn is one optimizer step on one row. Ours is what `steps run peft/megatron_bridge` does by default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.contenders.packs import Pack, packs
from benchmarks.side_by_side import Comparison, Programs, race, table
from steps.artifacts import record
from steps.shapes.account import Account
from steps.shapes.model_config import ModelConfig

#: The peers' compiler makes its kernels for a second length of row before it makes them for any.
WARMUP = 2
RANK = 16
# One group is in memory at a time. Name to module and arguments; {hf} and {base} are the model, {packed} the data.
_PEER, _OURS = ("{hf}", "{packed}"), ("{base}", "{packed}")
GROUPS: dict[str, Programs] = {
    "bf16": {
        "ours": ("ours", _OURS),
        "peft": ("transformers_peft", _PEER),
        "peft, torch.compile": ("transformers_peft", (*_PEER, "--compile")),
        "peak": ("matmul", ("bfloat16",)),
    },
    "bf16, other loops": {
        "ours": ("ours", _OURS),
        "ours, recompute": ("ours", (*_OURS, "--recompute")),
        "peft, gradient checkpointing": ("transformers_peft", (*_PEER, "--gradient-checkpointing")),
        "TRL SFTTrainer, packing": ("trl_sft", (*_PEER, "{tokenizer}")),
    },
    "float32": {
        "ours": ("ours", (*_OURS, "--precision", "float32")),
        "peft": ("transformers_peft", (*_PEER, "--precision", "float32")),
        "peak": ("matmul", ("float32",)),
    },
}
#: (group, ours, peer, owed, goal) of tokens/s.
SPEED = (
    ("bf16", "ours", "peft", 2.5, 4.0),
    ("bf16", "ours", "peft, torch.compile", 1.8, 3.0),
    ("bf16, other loops", "ours", "TRL SFTTrainer, packing", 4.0, 6.0),
    ("bf16, other loops", "ours, recompute", "peft, gradient checkpointing", None, None),
    ("float32", "ours", "peft", 1.7, 2.5),
)
SHARES = (("bf16", 0.25, 0.5), ("float32", 0.6, 0.75))


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    packed = inputs.packed(options.work)
    tokenizer = inputs.smollm2(options.work)[1]
    speeds, memory, shares = [], [], []
    for model, make in inputs.MODELS.items():
        base, hugging_face = make(options.work)
        places = {"base": base, "hf": hugging_face, "packed": packed, "tokenizer": tokenizer}
        rows = [*packs(packed, WARMUP + options.rounds, seed=0)][WARMUP:]
        for threads in (1, 2):
            what = f"{model}, {threads} thread{'s' if threads > 1 else ''}"
            found = {
                group: race(
                    programs, places, threads=threads, rounds=options.rounds, warmup=WARMUP, what=f"{what}, {group}"
                )
                for group, programs in GROUPS.items()
            }
            for group, ours, peer, owed, goal in SPEED:
                mine, theirs = found[group][ours], found[group][peer]
                name = f"{what}, {group.partition(',')[0]}{', recomputing' if 'recompute' in ours else ''}"
                speeds.append(Comparison(name, peer, speed(mine), speed(theirs), "tok/s", owed, goal).row())
                bounds = (0.5, 0.4) if (group, peer) == ("bf16", "peft") else (None, None)
                sizes = ([turn["peak_bytes"] / 1e9 for turn in turns] for turns in (mine, theirs))
                memory.append(Comparison(name, peer, *sizes, "GB", *bounds, inverse=True).row())
            for group, owed, goal in SHARES:
                work = [flops(shape(base), pack) / 1e9 for pack in rows]
                done = [gflop / turn["seconds"] for gflop, turn in zip(work, found[group]["ours"], strict=True)]
                peak = [turn["flops"] / turn["seconds"] / 1e9 for turn in found[group]["peak"]]
                shares.append(Comparison(f"{what}, {group}", "matrix product", done, peak, "GFLOP/s", owed, goal).row())
    return page(speeds, memory, shares)


def page(speeds: Sequence[list[str]], memory: Sequence[list[str]], shares: Sequence[list[str]]) -> str:
    """The section made of these rows."""
    return "\n\n".join(
        (
            "## Training",
            "LoRA of rank 16 on all linears, one packed row of 2,048 tokens a step (chitchat, two or three documents a "
            "row, two fifths of the tokens trained); 57M: Llama with 8 layers of 512, random; 135M: SmolLM2. `peft` is "
            "transformers + peft.",
            table(speeds),
            "Peak memory of the process, VmHWM:",
            table(memory),
            "Operations that a step cannot do without (products of the frozen linears forward and for the gradient of "
            "their input, of the adapters, of causal attention inside documents, of the output layer at trained "
            "tokens), against the product of two 2,048 x 2,048 matrices:",
            table(shares),
            "That share bounds every ratio above: at two thirds of the peak a step that did nothing but these products "
            "would take two thirds of the time. What else a bf16 step does: attention's softmax, the pointwise pieces, "
            "copies between them.",
        )
    )


def speed(turns: Sequence[dict[str, Any]]) -> list[float]:
    """Tokens a second of each turn."""
    return [turn["tokens"] / turn["seconds"] for turn in turns]


def shape(base: Path) -> ModelConfig:
    """Of a base that one of our steps made."""
    known = record.read(base)
    assert known is not None
    return ModelConfig(**known.facts["model"])


def flops(model: ModelConfig, pack: Pack) -> float:
    """Operations of one step on one row that cannot be left out."""
    from steps.config.peft.lora import LoRA

    account = Account.of(LoRA(type="lora", dim=RANK), model)
    tokens = sum(map(len, pack.documents))
    trained = sum(map(sum, pack.targets))
    linears = sum(kind.parameters for kind in account.kinds if kind.is_linear)
    pairs = sum(len(document) * (len(document) + 1) / 2 for document in pack.documents)
    # Two operations a weight and token, forward and for dx; an adapter's own gradient on top. Attention: two products
    # forward and four backward over the pairs that see each other. The output layer forward and backward.
    return (
        4.0 * linears * tokens
        + 6.0 * account.total.trainable * tokens
        + model.num_layers * 12.0 * pairs * model.query_size
        + 4.0 * model.vocab_size * model.hidden_size * trained
    )
