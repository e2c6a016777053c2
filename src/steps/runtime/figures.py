"""Figures as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steps.runtime.progress import duration
from steps.shapes.estimate import size

if TYPE_CHECKING:
    from steps.engine.train.finetune import Probed


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


def probed(found: Probed) -> dict[str, Any]:
    """What the person who probed a training run wants to read."""
    ratio = found.peak_bytes / found.expected_bytes
    return {
        "tokens_per_second": found.tokens_per_second,
        "seconds_per_step": found.seconds_per_step,
        "peak_memory": f"{size(found.peak_bytes)}, {ratio:.2f} of the {size(found.expected_bytes)} expected",
        "time_to_finish": f"{duration(found.iterations * found.seconds_per_step)} for {found.iterations:,} steps, "
        "evaluations and saves apart",
    }
