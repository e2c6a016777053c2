"""A conversion alone: python -m benchmarks.contenders.conversion_work hf_to_megatron|megatron_to_hf INPUT OUTPUT.

Prints the seconds from the call to the files on the disk, imports not included; as the step, it takes the digest.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from steps.artifacts.record import digest_files
from steps.engine.checkpoint.convert import hf_to_megatron, megatron_source, to_hf_directory
from steps.engine.checkpoint.hf import open_source


def main(direction: str, source: str, output: Path) -> None:
    began = time.perf_counter()
    if direction == "hf_to_megatron":
        hf_to_megatron(open_source(source), output)
    else:
        to_hf_directory(megatron_source(Path(source)), output)
    digest_files(output)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
