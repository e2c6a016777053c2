"""The floor: encode_batch_fast over texts rendered before, and nothing else. ARGUMENTS: data, tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.contenders.turns import Turns
from steps.engine.data.tokenizer import Tokenizer

BATCH = 64


def main() -> None:
    data, tokenizer = sys.argv[1:]
    loaded = Tokenizer.load(tokenizer)
    with Path(data).open(encoding="utf-8") as file:
        texts = [loaded.render(json.loads(line)["messages"]) for line in file]
    turns = Turns()
    while turns.asked():
        tokens = 0
        for at in range(0, len(texts), BATCH):
            tokens += sum(map(len, loaded.backend.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)))
        turns.done(tokens=tokens)


if __name__ == "__main__":
    main()
