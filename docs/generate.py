"""Write what is made from the code: docs/cli.md, the table of steps in README.md, the counted tables of
docs/peft-methods.md. `--check` only compares, for CI.

python docs/generate.py [--check]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import peft_tables

from steps.dispatch import catalog, render

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"


#: `typer … utils docs` reads the module itself, where the groups that are added late are missing.
_WHOLE = """
import typer.cli, typer.main
from steps.dispatch import cli
cli.add_groups()
command = typer.main.get_command(cli.app)
print(typer.cli.get_docs_for_click(obj=command, ctx=command.context_class(command, info_name="steps"), name="steps"))
"""


def cli() -> str:
    """The command line's reference, from the command line itself."""
    command = [sys.executable, "-c", _WHOLE]
    # A fixed width keeps the text the same on every terminal.
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return "<!-- Written by docs/generate.py; edit the code instead. -->\n\n" + done.stdout.strip() + "\n"


def readme() -> str:
    """README.md with its table of steps made anew."""
    rows = ["| step | takes | makes | what it does |", "| --- | --- | --- | --- |"]
    for step in catalog.catalog().values():
        link = f"[{step.id}]({step.folder.relative_to(README.parent).as_posix()}/README.md)"
        rows.append(f"| {link} | {render.types(step.consumes)} | {render.types(step.produces)} | {step.name} |")
    return _filled(README.read_text(), {"steps": "\n".join(rows) + "\n"})


def peft_methods() -> str:
    """docs/peft-methods.md with its counted tables made anew."""
    return _filled((DOCS / "peft-methods.md").read_text(), peft_tables.blocks())


def _filled(text: str, blocks: Mapping[str, str]) -> str:
    """The text with what stands between `<!-- NAME:begin … -->` and `<!-- NAME:end -->` replaced, for each block."""
    for name, block in blocks.items():
        pattern = rf"(<!-- {name}:begin .*?-->\n?).*?(<!-- {name}:end -->)"
        text, found = re.subn(pattern, lambda match, block=block: f"{match[1]}{block}{match[2]}", text, flags=re.S)
        assert found == 1, f"the markers of {name} are there {found} times"
    return text


def main() -> int:
    wanted = {DOCS / "cli.md": cli(), README: readme(), DOCS / "peft-methods.md": peft_methods()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path} is out of date: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
