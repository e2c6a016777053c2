"""What data_prep/sft_packing does, without its process: JSON lines to packed Parquet.

ARGUMENTS: data, tokenizer, library, pack size, output directory.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.contenders.turns import Turns
from steps.engine.data import blend, reading, sft
from steps.engine.data.tokenizer import Tokenizer
from steps.engine.data.tokenizing import Settings
from steps.engine.progress import SILENT


def main() -> None:
    data, tokenizer, library, pack_size, out = sys.argv[1:]
    turns = Turns()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        Path(out).mkdir()
        loaded = Tokenizer.load(tokenizer)  # anew, so that nothing known of it shortens the turn
        if not turns.asked():
            return
        files = reading.examine(blend.resolve(data))
        settings = Settings(int(pack_size), ratios=(1.0, 0.0, 0.0), library=library)
        report = sft.pack_conversations(Path(out), sft.Plan(loaded, files, settings), SILENT, num_workers=1)
        train = report["splits"]["train"]
        turns.done(tokens=train["tokens"], trained=train["trained_tokens"], packs=train["packs"], by=report["library"])


if __name__ == "__main__":
    main()
