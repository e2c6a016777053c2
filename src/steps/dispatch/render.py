"""What a person reads: tables that never cut a word, and the sheet of a dry run. Plain text; no imports that cost."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steps.dispatch import catalog
from steps.manifest import Manifest, Port

_BOLD, _DIM, _PLAIN = "\033[1m", "\033[2m", "\033[0m"


def bold(text: str) -> str:
    """Bold on a terminal, as it is elsewhere."""
    return f"{_BOLD}{text}{_PLAIN}" if sys.stdout.isatty() else text


def dim(text: str) -> str:
    """Pale on a terminal, as it is elsewhere."""
    return f"{_DIM}{text}{_PLAIN}" if sys.stdout.isatty() else text


def width() -> int:
    """Columns to wrap to: the terminal's; never wrap what goes into a pipe, where `grep` reads lines."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 100_000


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, the last one wrapped; on a terminal too narrow for that, a paragraph for each row.

    Ids and types are never cut.
    """
    sizes = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header) - 1)]
    room = width() - sum(sizes) - 2 * len(sizes)
    if room < 24:
        yield from _paragraphs(rows)
        return
    for number, row in enumerate([header, *rows]):
        left = "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=False))
        for index, line in enumerate(textwrap.wrap(row[-1], room) or [""]):
            text = f"{left}  {line}" if index == 0 else f"{' ' * len(left)}  {line}"
            yield bold(text.rstrip()) if number == 0 else text.rstrip()


def figures(header: Sequence[str], rows: Sequence[Sequence[str]], *, summed: bool = True) -> Iterator[str]:
    """Aligned columns of numbers behind a first one of names. summed: the last row is the sum of the others."""
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for number, (name, *cells) in enumerate([header, *rows]):
        right = [cell.rjust(size) for cell, size in zip(cells, sizes[1:], strict=True)]
        text = "  ".join([name.ljust(sizes[0]), *right]).rstrip()
        yield bold(text) if number == 0 or (summed and number == len(rows)) else text


def _paragraphs(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for first, *others in rows:
        yield bold(first)
        for cell in others:
            yield from textwrap.wrap(
                cell, max(20, width() - 4), initial_indent="    ", subsequent_indent="    ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip


def types(ports: Sequence[Port]) -> str:
    return ", ".join(port.type if port.required else f"{port.type}?" for port in ports) or "-"


def step_list(steps: Sequence[Manifest]) -> Iterator[str]:
    rows = [(step.id, types(step.consumes), types(step.produces), one_line(step.name)) for step in steps]
    yield from table(("STEP", "CONSUMES", "PRODUCES", "WHAT IT DOES"), rows)


def step_tree(steps: Sequence[Manifest]) -> Iterator[str]:
    for category in dict.fromkeys(step.category for step in steps):
        yield bold(category)
        inside = [step for step in steps if step.category == category]
        for step in inside:
            last = step is inside[-1]
            yield f"{'└──' if last else '├──'} {step.id.partition('/')[2]}  {dim(one_line(step.name))}"
            bar = "    " if last else "│   "
            yield f"{bar}    {types(step.consumes)} -> {types(step.produces)}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def step_json(step: Manifest) -> dict[str, Any]:
    """A manifest as data, for `--json`."""

    def rows(entries: Sequence[Any]) -> list[dict[str, Any]]:
        return [dict(vars(entry)) for entry in entries]

    return {
        "id": step.id, "name": step.name, "category": step.category, "description": one_line(step.description),
        "tags": list(step.tags), "consumes": rows(step.consumes), "produces": rows(step.produces),
        "configs": list(catalog.configs(step)), "parameters": rows(step.parameters),
        "strategies": rows(step.strategies), "errors": rows(step.errors), "run": dict(vars(step.run)),
        "reference": dict(step.reference),
    }  # fmt: skip


def step_page(step: Manifest, parameters: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Everything there is to know about a step. parameters: key, type, default, description of each."""
    room = min(width(), 100)
    yield f"{bold(step.id)}  {step.name}"
    yield from textwrap.wrap(one_line(step.description), room)
    for title, ports in (("Consumes", step.consumes), ("Produces", step.produces)):
        yield from section(title)
        told = [(port.type, port.key, ("" if port.required else "(optional) ") + port.description) for port in ports]
        yield from table(("TYPE", "CONFIG KEY", "WHAT"), told) if told else iter(["nothing"])
    yield from section("Configs")
    for name, path in catalog.configs(step).items():
        yield f"-c {name:<12} {path}"
    yield from section("Parameters")
    rows = [(entry["key"], entry["type"], show_value(entry["default"]), entry["description"]) for entry in parameters]
    yield from table(("KEY", "TYPE", "DEFAULT", "WHAT"), rows)
    if step.strategies:
        yield from section("Strategies")
        yield from table(("WHEN", "THEN"), [(entry.when, entry.then) for entry in step.strategies])
    if step.errors:
        yield from section("Errors")
        yield from table(
            ("NAME", "CAUSE AND RECOVERY"), [(entry.name, f"{entry.cause} {entry.recovery}") for entry in step.errors]
        )
    yield from section("Run")
    facts = {"launch": step.run.launch, "image": step.run.image, **step.run.resources, **step.reference}
    shown = {name: str(value) for name, value in facts.items() if value != ""}
    size = max(map(len, shown))
    yield from (f"{name:<{size}}  {value}" for name, value in shown.items())


def four_digits(value: float) -> str:
    """Four digits, or all before the point where these are more: 0.0123, 82.38, 10,190. Never 1.019e+04."""
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def section(title: str) -> Iterator[str]:
    yield ""
    yield bold(title)


def show_value(value: Any) -> str:
    """A value as YAML would have it, on one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def annotated(data: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    """YAML with a comment behind each value that says where it came from."""
    from steps.config.validate import source_of

    lines = list(_yaml_lines(data, "", 0))
    column = min(64, max((len(text) for text, _ in lines), default=0)) + 2
    for text, key in lines:
        source = source_of(key, sources) if key else ""
        yield f"{text.ljust(column - 1)} {dim('# ' + source)}" if source else text


def _yaml_lines(data: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    from steps.config import yaml12

    for name, value in data.items():
        indent, key = "  " * depth, f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:", ""
            yield from _yaml_lines(value, f"{key}.", depth + 1)
        elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
            yield f"{indent}{name}: {json.dumps(value)}", key
        elif isinstance(value, list):
            yield f"{indent}{name}: [{', '.join(yaml12.dump(item).splitlines()[0] for item in value)}]", key
        elif isinstance(value, str) and "\n" in value:
            yield f"{indent}{name}: {json.dumps(value)}", key
        else:
            yield (
                f"{indent}{name}: {yaml12.dump(value).splitlines()[0]}" if value != {} else f"{indent}{name}: {{}}",
                key,
            )
