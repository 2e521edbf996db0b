"""What counts as a number: small predicates for checking what a user or a file gives."""

from __future__ import annotations

import math


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether `value` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
