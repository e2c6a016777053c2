"""Run benchmarks and write their sections of benchmarks/RESULTS.md.

    python -m benchmarks [SECTION …] [--rounds N] [--work DIR] [--print]

Each section is a module of this folder with a function `section(options) -> str`, Markdown. Without names all but `gpu`
run: under an hour on two quiet cores. The rest of RESULTS.md stays as it is, so that one section can be made anew.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
#: Made only when asked for by name.
BY_NAME = ("gpu",)
SECTIONS = ("training", "estimate", "packing", "conversion", "startup")
PACKAGES = ("torch", "transformers", "peft", "trl", "tokenizers", "tiktoken", "safetensors", "pyarrow")


def machine() -> str:
    """Processor, cores, memory and versions, in a line."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )  # of the last core; they are alike
    names = {name.strip(): value.strip() for name, value in fields.items()}
    flags = names.get("flags", "").split()
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name))
    processor = f"{names.get('model name', platform.processor())} ({', '.join(units)})"
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join((*SECTIONS, *BY_NAME)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("output/bench"), help="models and data are made here, once")
    parser.add_argument("--print", action="store_true", help="only print")
    options = parser.parse_args()
    if unknown := set(options.sections) - {*SECTIONS, *BY_NAME}:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join((*SECTIONS, *BY_NAME))}")
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.sections or SECTIONS:
        text = importlib.import_module(f"benchmarks.{name}").section(options)
        stamp = f"Measured {datetime.now(timezone.utc):%Y-%m-%d} on {machine()}. Medians of {options.rounds} rounds."
        text = f"{text.strip()}\n\n{stamp}\n"
        print(text, flush=True)
        if not options.print:
            write(name, text)


def write(name: str, text: str, path: Path = RESULTS) -> None:
    """Put the section's text between its marks in a page."""
    pattern = rf"(<!-- {name}:begin.*?-->\n).*?(<!-- {name}:end -->)"
    page, count = re.subn(pattern, lambda match: match[1] + text + match[2], path.read_text(), flags=re.DOTALL)
    assert count == 1, f"{path} has no block {name}:begin … {name}:end"
    path.write_text(page)


if __name__ == "__main__":
    main()
