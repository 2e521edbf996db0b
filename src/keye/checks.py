"""Small checks of what a user or a file gives: what counts as a number, which name was probably meant."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float, and no bool; whole numbers that no float holds are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    """Whether `value` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is probably a typing error of: other case or separators, or one or two characters
    added, left out, changed or swapped. None where there is none, also for a name that is known."""
    plain = _plain(name)
    if len(plain) > 64:
        return None
    best: tuple[int, str] | None = None
    for other in sorted(known):
        if other == name:
            return None
        target = _plain(other)
        most = 0 if len(target) < 3 else 1 if max(len(plain), len(target)) <= 5 else 2
        if abs(len(plain) - len(target)) <= most and (distance := _edits(plain, target)) <= most:
            best = min(best or (distance, other), (distance, other))
    return None if best is None else best[1]


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _edits(one: str, other: str) -> int:
    """Edit distance in which swapping neighbours counts as one edit (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, above, row = row, before, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
