from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.engine.search.pareto import crowding, dominates, fronts

#: Few values, so that many coordinates are equal.
POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=25)


def test_dominance_is_nowhere_worse_and_somewhere_better():
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))


@given(POINTS)
def test_fronts_are_peeled_off_one_after_the_other(points):
    left, expected = list(range(len(points))), []
    while left:
        front = [one for one in left if not any(dominates(points[other], points[one]) for other in left)]
        expected.append(front)
        left = [one for one in left if one not in front]
    assert fronts(points) == expected


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=3, max_size=20, unique=True))
def test_crowding_is_the_box_up_to_the_neighbours(points):
    front = [points[index] for index in fronts(points)[0]]
    if len({x for x, _ in front}) < 3:
        return
    # On a front of two objectives one falls as the other rises: both have the same neighbours.
    ordered = sorted(front)
    spans = [max(axis) - min(axis) for axis in zip(*ordered, strict=True)]
    expected = {ordered[0]: np.inf, ordered[-1]: np.inf}
    for before, point, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
        expected[point] = sum(abs(b - a) / span for a, b, span in zip(before, after, spans, strict=True))
    assert crowding(front) == pytest.approx([expected[point] for point in front])


def test_a_coordinate_that_all_share_says_nothing():
    assert crowding([(1, 7), (2, 7), (4, 7)]) == [np.inf, 1, np.inf]
    assert crowding([(1, 7)]) == [0]
