"""The comparison as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from steps.engine.comparison.results import Figure, Row, ranked
from steps.shapes.estimate import size


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, the best variant first. Columns that no variant has are left out."""
    ordered = ranked(rows)
    columns: list[tuple[str, list[str]]] = [
        ("variant", [row.name for row in ordered]),
        ("method", [row.method or "-" for row in ordered]),
        ("learning rate", [f"{row.lr:g}" for row in ordered]),
        ("trained parameters", ["-" if row.trainable is None else f"{row.trainable:,}" for row in ordered]),
        ("share", ["-" if row.share is None else f"{100 * row.share:.3g} %" for row in ordered]),
        ("valid loss", [_figure(row.valid_loss, 4) if not row.error else f"failed: {row.error}" for row in ordered]),
        ("accuracy", [_figure(row.accuracy, 3) for row in ordered]),
        ("macro F1", [_figure(row.macro_f1, 3) for row in ordered]),
        ("training", [_figure(row.seconds, 0, " s") for row in ordered]),
        ("tokens/s", [_figure(row.tokens_per_second, 0) for row in ordered]),
        ("peak memory", ["-" if row.peak_bytes is None else size(row.peak_bytes) for row in ordered]),
        ("runs", [str(row.runs) for row in ordered]),
    ]
    kept = [(name, column) for name, column in columns if set(column) != {"-"}]
    return [name for name, _ in kept], [list(line) for line in zip(*(column for _, column in kept), strict=True)]


def markdown(rows: Sequence[Row]) -> str:
    """The table; a figure of several seeds with its least and most."""
    header, lines = cells(rows)

    def line(parts: Sequence[str]) -> str:
        return f"| {' | '.join(part.replace('|', '/') for part in parts)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, lines)]) + "\n"


def _figure(figure: Figure | None, digits: int, unit: str = "") -> str:
    if figure is None:
        return "-"
    if figure.low == figure.high:
        return f"{figure.mean:,.{digits}f}{unit}"
    return f"{figure.mean:,.{digits}f}{unit} ({figure.low:,.{digits}f} to {figure.high:,.{digits}f})"


def remarks(rows: Sequence[Row], base_loss: float | None) -> Iterator[str]:
    """What the table does not say by itself."""
    if base_loss is not None:
        yield f"The base, before any training, has a valid loss of {base_loss:.4f}."
    ordered = [row for row in ranked(rows) if row.valid_loss is not None]
    for one, other in pairwise(ordered):
        assert one.valid_loss is not None
        assert other.valid_loss is not None
        if one.valid_loss.high >= other.valid_loss.low and max(one.runs, other.runs) > 1:
            yield f"{one.name} and {other.name} overlap over their seeds: their order may be luck."
    if any(row.error for row in rows):
        failed = ", ".join(row.name for row in rows if row.error)
        yield f"Failed: {failed}. The same command runs only what is missing."
