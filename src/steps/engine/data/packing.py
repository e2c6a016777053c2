"""Which conversations share a row: best-fit-decreasing bin packing over a histogram of lengths.

Best-fit-decreasing takes items from long to short and puts each into the fullest bin it still fits in. Items of one
length are placed in bulk: a bin with r tokens left takes r // length of them one after the other, because after the
first it is still the fullest bin that fits. So the bins are those of the item-by-item algorithm, in a time that depends
on the number of different lengths rather than of items. (It never needs
more than 11/9 of the fewest possible bins plus 4: D. S. Johnson et al., SIAM J. Comput. 3, 1974.)
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute items over bins.

    lengths: integers [items], each from 1 to `capacity`.
    Returns (order, starts): bin b holds the items order[starts[b]:starts[b + 1]], longest first; starts has one entry
    more than there are bins. Equal input gives equal output. Raises ValueError for a length that fits no bin.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be from 1 to {capacity}, got {lengths.min()} to {lengths.max()}")
    counts = np.bincount(lengths, minlength=1)
    bins = _Bins(capacity)
    placed = np.empty(len(lengths), np.int32)  # the bin of each item, items from long to short
    position = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[length])
        bins.place(length, placed[position : position + count])
        position += count
    # Both sorts are stable, so ties keep the order of the input. Narrow integers get NumPy's radix sort.
    narrow = np.uint16 if capacity < 1 << 16 else np.uint32
    by_length = np.argsort((capacity - lengths).astype(narrow), kind="stable")
    by_bin = np.argsort(placed, kind="stable")
    starts = np.zeros(bins.number + 1, np.int64)
    np.cumsum(np.bincount(placed, minlength=bins.number), out=starts[1:])
    return by_length[by_bin], starts


class _Bins:
    """Open bins by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self.number, self._capacity = 0, capacity
        self._rooms: list[int] = []  # the sizes of room that exist, ascending
        self._with_room: dict[int, list[np.ndarray]] = {}

    def place(self, length: int, out: np.ndarray) -> None:
        """Place len(out) items of one length; write the number of each one's bin to `out`."""
        done = 0
        at = bisect_left(self._rooms, length)
        freed: list[tuple[int, np.ndarray]] = []
        while done < len(out) and at < len(self._rooms):
            room = self._rooms[at]
            done = self._fill(room, length, out, done, freed)
            if self._with_room[room]:
                at += 1  # only when the items ran out
            else:
                del self._with_room[room], self._rooms[at]
        if done < len(out):
            per_bin = self._capacity // length
            fresh = np.arange(self.number, self.number + -(-(len(out) - done) // per_bin), dtype=np.int32)
            self.number += len(fresh)
            self._put(fresh, self._capacity, length, out, done, freed)
        for room, numbers in freed:
            if room not in self._with_room:
                self._with_room[room] = []
                insort(self._rooms, room)
            self._with_room[room].append(numbers)

    def _fill(self, room: int, length: int, out: np.ndarray, done: int, freed: list[tuple[int, np.ndarray]]) -> int:
        """Fill bins with `room` left until they or the items run out; return how many items are placed."""
        groups = self._with_room[room]
        while groups and done < len(out):
            numbers = groups.pop(0)
            needed = -(-(len(out) - done) // (room // length))
            if needed < len(numbers):
                groups.insert(0, numbers[needed:])
                numbers = numbers[:needed]
            done = self._put(numbers, room, length, out, done, freed)
        return done

    def _put(
        self, numbers: np.ndarray, room: int, length: int, out: np.ndarray, done: int,
        freed: list[tuple[int, np.ndarray]],
    ) -> int:  # fmt: skip
        per_bin = room // length
        items = min(len(numbers) * per_bin, len(out) - done)
        out[done : done + items] = np.repeat(numbers, per_bin)[:items]
        full, rest = divmod(items, per_bin)
        if full:
            freed.append((room - per_bin * length, numbers[:full]))
        if rest:  # the last bin, when the items ran out
            freed.append((room - rest * length, numbers[full : full + 1]))
        return done + items


def lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """The Martello-Toth bound L2: no packing needs fewer bins. (Discrete Applied Mathematics 28 (1990), 59-70.)

    For each threshold k <= capacity / 2: items above capacity - k and those above capacity / 2 need a bin each; what of
    the items between k and capacity / 2 does not fit beside the latter needs bins of its own.
    """
    lengths = np.sort(np.asarray(lengths, np.int64))
    sums = np.concatenate([[0], np.cumsum(lengths)])
    half = int(np.searchsorted(lengths, capacity / 2, "right"))
    best = -(-int(sums[-1]) // capacity)
    for k in np.unique(np.concatenate([[0], lengths[:half]])).tolist():
        large = int(np.searchsorted(lengths, capacity - k, "right"))  # from here on: above capacity - k
        small = int(np.searchsorted(lengths, k, "left"))
        medium = large - half
        left = int(sums[half] - sums[small]) - (medium * capacity - int(sums[large] - sums[half]))
        best = max(best, len(lengths) - half + max(0, -(-left // capacity)))
    return best
