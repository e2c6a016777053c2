"""Figures as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def interval(figures: Mapping[str, Any], name: str) -> str:
    """ "3.214 (3.102 to 3.326)": a figure, and its `_low` and `_high` where there are any."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    shown = f"{figures[name]:,.4g}"
    return shown if low is None else f"{shown} ({low:,.4g} to {high:,.4g})"


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> Iterator[str]:
    """A confusion matrix as a table: a row for each right label, a column for each predicted one."""
    head = ("right \\ predicted", *labels)
    rows = [(name, *(f"{count:,}" for count in counts)) for name, counts in zip(labels, matrix, strict=True)]
    sizes = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, *cells in (head, *rows):
        yield "  ".join(
            [name.ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(cells, sizes[1:], strict=True))]
        )
