"""Best-fit-decreasing: every item once, no bin too full, the bins of the textbook algorithm."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps.engine.data.packing import lower_bound, pack


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 70))
    return capacity, draw(st.lists(st.integers(1, capacity), max_size=120))


def item_by_item(lengths: list[int], capacity: int) -> list[int]:
    """Textbook best-fit-decreasing; returns how full each bin is."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(room) if left >= length]
        if not fitting:
            room.append(capacity)
            fitting = [len(room) - 1]
        room[min(fitting, key=lambda index: room[index])] -= length
    return [capacity - left for left in room]


@given(problems())
@settings(max_examples=400, deadline=None)
def test_the_bins_are_those_of_best_fit_decreasing(problem):
    capacity, lengths = problem
    array = np.asarray(lengths, np.int32)
    order, starts = pack(array, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    bins = [array[order[begin:end]] for begin, end in pairwise(starts)]
    assert all(len(members) for members in bins)
    assert all(members.sum() <= capacity for members in bins)
    assert sorted(int(members.sum()) for members in bins) == sorted(item_by_item(lengths, capacity))
    assert all((np.diff(members) <= 0).all() for members in bins)
    assert lower_bound(array, capacity) <= len(bins)


@pytest.mark.parametrize(("lengths", "capacity", "bins"), [([], 8, 0), ([8], 8, 1), ([3] * 7, 7, 4), ([5] * 4, 9, 4)])
def test_small_cases_known_by_hand(lengths, capacity, bins):
    assert len(pack(np.asarray(lengths, np.int32), capacity)[1]) - 1 == bins


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_fits_no_bin_is_refused(length):
    with pytest.raises(ValueError, match="from 1 to 8"):
        pack(np.asarray([3, length]), 8)


@pytest.mark.parametrize("capacity", [4096, 3000, 100_000])
def test_chat_lengths_come_within_a_tenth_of_a_per_mille_of_the_lower_bound(capacity):
    lengths = np.exp(np.random.RandomState(0).normal(np.log(400), 1.0, 200_000)).clip(8, capacity).astype(np.int32)
    bins = len(pack(lengths, capacity)[1]) - 1
    bound = lower_bound(lengths, capacity)
    assert bound <= bins <= bound * 1.0001 + 1


def test_the_lower_bound_knows_items_that_cannot_share_a_bin():
    assert lower_bound(np.asarray([6, 6, 6]), 10) == 3  # their sum alone would say 2
    assert lower_bound(np.asarray([7, 7, 4, 4]), 10) == 3  # the fours fit beside no seven
    assert lower_bound(np.asarray([], np.int32), 10) == 0


@pytest.mark.slow
def test_ten_million_items_take_seconds():
    import time

    lengths = np.exp(np.random.RandomState(0).normal(np.log(400), 1.0, 10_000_000)).clip(8, 4096).astype(np.int32)
    began = time.process_time()
    _, starts = pack(lengths, 4096)
    assert time.process_time() - began < 10
    assert len(starts) - 1 <= lower_bound(lengths, 4096) * 1.0001
