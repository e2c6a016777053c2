"""Pareto dominance among points of which every coordinate is to be small, as NSGA-II uses it (Deb et al. 2002)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: One coordinate for each objective.
Point = Sequence[float]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def fronts(points: Sequence[Point]) -> list[list[int]]:
    """Indices of the points, sorted into fronts: the first is dominated by nobody, the next only by the first, ….

    Ascending inside a front. Equal points share a front. O(n^2) time and memory.
    """
    if not points:
        return []
    values = np.asarray(points, dtype=np.float64)
    one, other = values[:, None], values[None]
    below = np.asarray((one <= other).all(-1) & (one < other).any(-1))  # [i, j]: i dominates j
    dominators = below.sum(0)
    sorted_in: list[list[int]] = []
    while (dominators >= 0).any():
        front = np.flatnonzero(dominators == 0)
        sorted_in.append(front.tolist())
        dominators = dominators - below[front].sum(0)
        dominators[front] = -1
    return sorted_in


def crowding(points: Sequence[Point]) -> list[float]:
    """How much room each point of one front has: half the perimeter of the box up to its neighbours, ends infinite.

    Coordinates count in units of the front's own range; one without a range counts nothing.
    """
    values = np.asarray(points, dtype=np.float64)
    room = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        spread = column[order[-1]] - column[order[0]]
        if spread > 0:
            room[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
            room[order[[0, -1]]] = np.inf
    return room.tolist()  # type: ignore[no-any-return]
