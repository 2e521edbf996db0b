"""In which order the rows of several sets come: shuffled, mixed by weights, the same for the same seed.

Nothing is stored for a row, so that order costs no memory and a run resumes from a few counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

_ROUNDS: Final = 4
_MASK: Final = (1 << 64) - 1


def derive_key(*parts: object) -> int:
    """64 bits that follow from numbers and texts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def scramble(value: int) -> int:
    """64 bits in which every bit depends on all of `value` (splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A shuffled order of `range(count)` in which every place is computed on its own.

    A Feistel network over the least even number of bits, walked until it hits the range: at most four steps on average.
    """

    def __init__(self, count: int, key: int) -> None:
        assert count > 0
        self.count = count
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        self._keys = tuple(scramble(key ^ turn) for turn in range(_ROUNDS))

    def __getitem__(self, place: int) -> int:
        assert 0 <= place < self.count
        half, low = self._half, self._low
        while True:
            left, right = place >> half, place & low
            for key in self._keys:
                left, right = right, left ^ (scramble(right ^ key) & low)
            place = left << half | right
            if place < self.count:
                return place


class Order:
    """The rows of a set in one epoch: its `picked` rows of all, shuffled.

    Where rows lie in `blocks` (first rows, ascending from 0) that are read as one, blocks are shuffled and then the
    rows of each `window` neighbouring ones, so that a reader that keeps so many blocks reads each once.
    """

    def __init__(
        self, rows: int, picked: int, seed: int, epoch: int, blocks: NDArray[np.int64] | None = None, window: int = 1
    ) -> None:
        self._rows, self._picked = rows, picked
        self._pick = None if picked == rows else Permutation(rows, derive_key(seed, "pick"))
        key = derive_key(seed, "order", epoch)
        if blocks is None:
            self._shuffle: Permutation | _BlockShuffle = Permutation(picked, key)
            self._listed = None
            return
        # Rows that were picked lie in every block: they are listed, in the order of the file.
        self._listed = None if self._pick is None else self._list()
        edges = np.append(blocks, rows)
        places = edges if self._listed is None else np.searchsorted(self._listed, edges)
        self._shuffle = _BlockShuffle(places.astype(np.int64), window, key)

    def __getitem__(self, place: int) -> int:
        """The row that comes after `place` others."""
        index = self._shuffle[place % self._picked]
        if self._listed is not None:
            return int(self._listed[index])
        return index if self._pick is None else self._pick[index % self._rows]

    def _list(self) -> NDArray[np.int64]:
        assert self._pick is not None
        rows = np.fromiter((self._pick[i % self._rows] for i in range(self._picked)), np.int64, self._picked)
        rows.sort()
        return rows


class _BlockShuffle:
    """A shuffled order of places that lie in blocks, window by window. `edges` are the first places of the blocks and
    the end, int64 [blocks + 1]."""

    def __init__(self, edges: NDArray[np.int64], window: int, key: int) -> None:
        blocks, self._key = Permutation(len(edges) - 1, key), key
        order = np.fromiter((blocks[i] for i in range(blocks.count)), np.int64, blocks.count)
        self._starts, sizes = edges[order], np.diff(edges)[order]
        self._ends = np.cumsum(sizes)
        self._windows = np.append(0, self._ends[np.r_[window - 1 : len(sizes) - 1 : window, len(sizes) - 1]])
        self._current: tuple[int, Permutation] | None = None

    def __getitem__(self, place: int) -> int:
        number = int(np.searchsorted(self._windows, place, side="right")) - 1
        first = int(self._windows[number])
        if self._current is None or self._current[0] != number:
            count = int(self._windows[number + 1]) - first
            self._current = (number, Permutation(count, derive_key(self._key, number)))
        place = first + self._current[1][place - first]
        block = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        return int(self._starts[block]) + place - before


class Mixer:
    """Which set the next sample comes from, so that at every place the sets have had nearly their shares.

    `quotas` are the samples of each set in an epoch. The k-th sample of a set has its time in the epoch, drawn between
    k and k + 1 parts of its quota; sets are merged by these times. `counts` is all the state there is.
    """

    def __init__(self, quotas: Sequence[int], key: int, counts: Sequence[int] | None = None) -> None:
        self.quotas, self._key = tuple(quotas), key
        self.counts = list(counts or [0] * len(self.quotas))
        self._times = [self._time(index) for index in range(len(self.quotas))]

    def take(self) -> tuple[int, int] | None:
        """The set and how many samples of it came before in the epoch; None at the end of the epoch."""
        index = min(range(len(self._times)), key=self._times.__getitem__, default=None)
        if index is None or self.counts[index] >= self.quotas[index]:
            return None
        before = self.counts[index]
        self.counts[index] += 1
        self._times[index] = self._time(index)
        return index, before

    def _time(self, index: int) -> float:
        count, quota = self.counts[index], self.quotas[index]
        if count >= quota:
            return 2.0
        drawn = scramble(self._key ^ scramble(index << 48 ^ count)) / 2.0**64
        return (count + drawn) / quota


def quota(rows: int, weight: float) -> int:
    """Samples of a set of `rows` in one epoch: `weight` passes, at least one sample."""
    return max(1, round(Fraction(weight) * rows))
