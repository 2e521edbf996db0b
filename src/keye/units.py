"""What people write and read: byte sizes, large numbers, and text that is safe to print.

`8GB` is 8 * 10**9 bytes, `8GiB` is 8 * 2**30.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from keye.errors import KeyeError, Option

KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
TIB: Final = 2**40
_UNITS: Final = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_SIZE: Final = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([a-z]{0,3})")


def parse_bytes(size: str | int, option: str) -> int:
    """Bytes of 8000000, "8GiB", "512MB" or "1.5 TiB". `KeyeError` names `option` for anything else: a letter alone, as
    in 8G, may mean either power."""
    text = str(size).strip().lower()
    match = _SIZE.fullmatch(text)
    if match is not None and match[2] in _UNITS and float(match[1]) * _UNITS[match[2]] >= 1:
        return round(float(match[1]) * _UNITS[match[2]])
    if match is not None and match[2] in ("k", "m", "g", "t"):
        number, letter = match[1], "k" if match[2] == "k" else match[2].upper()
        raise KeyeError(
            "{} is {!r}; write {}{}B for powers of 1000 or {}{}iB for powers of 1024",
            Option(option), size, number, letter, number, letter.upper(),
        )  # fmt: skip
    raise KeyeError("{} is {!r}; write a size such as 8GiB or 500MB", Option(option), size)


def format_bytes(nbytes: float) -> str:
    """Bytes with three digits, in powers of 1024: 12 B, 1.5 KiB, 812 MiB, 25.8 GiB."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:.0f} {name}" if value >= 999.5 else f"{value:.3g} {name}"
    return f"{nbytes:.0f} B"


def format_count(number: int) -> str:
    """A large number in words: 31.12 billion."""
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return str(number)


def plural(number: int, noun: str) -> str:
    """`1 frame`, `2 frames`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with control characters (but line ends and tabs) and changes of direction replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """`text` printable and on one line."""
    return printable(" ".join(text.split()))


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
