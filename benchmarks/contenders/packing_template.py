"""The usual script: apply_chat_template with its mask, one conversation after the other; TRL packs; Parquet.

ARGUMENTS: data, tokenizer, pack size, output file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import datasets
import transformers
import trl

from benchmarks.contenders.turns import Turns


def main() -> None:
    data, tokenizer, pack_size, out = sys.argv[1:]
    auto = transformers.AutoTokenizer.from_pretrained(tokenizer)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    turns = Turns()
    while turns.asked():
        rows: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
        with Path(data).open(encoding="utf-8") as file:
            for line in file:
                encoded = auto.apply_chat_template(
                    json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
                )
                for name, values in rows.items():
                    values.append(encoded[name])
        tokenized = time.process_time()
        packed = trl.pack_dataset(datasets.Dataset.from_dict(rows), int(pack_size), strategy="bfd")
        packed.to_parquet(out)
        turns.done(
            tokens=sum(map(len, rows["input_ids"])),
            trained=sum(map(sum, rows["assistant_masks"])),
            packs=len(packed),
            packing_seconds=time.process_time() - tokenized,
        )


if __name__ == "__main__":
    main()
