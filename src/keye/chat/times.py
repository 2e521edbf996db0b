"""Times in replies and for people: intervals of seconds, written and read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from keye.errors import KeyeError

Interval = tuple[float, float]
"""Start and end in seconds, start <= end."""

# Every repetition is bounded, so that matching is linear in the length of any text.
_TIME: Final = r"((?:[0-9]{1,3}:){0,2}[0-9]{1,7}(?:\.[0-9]{1,6})?)"
_PAIR: Final = re.compile(rf"\[\s{{0,4}}{_TIME} ?s?\s{{0,4}},\s{{0,4}}{_TIME} ?s?\s{{0,4}}\]")
_OPENING: Final = re.compile(r"(?:\[|<\|clip_time_start\|>)\s{0,4}\Z")
_COMMA: Final = re.compile(r"\s{0,4},\s{0,4}\Z")
_EMPTY: Final = re.compile(r"\[\s{0,4}\]")
_COORDINATE_MARKS: Final = ("point", "box", "quad", "polygon")


def parse_intervals(text: str) -> list[Interval] | None:
    """The time intervals written in `text`, in seconds and in their order; None if it holds no list of intervals.

    Read are `[[start, end], ...]`, `[]` (never) and `<|clip_time_start|>[start, end]<|clip_time_end|>`; a time is
    seconds, mm:ss or hh:mm:ss, each with optional decimals. Pairs that end before they start are left out, and so are
    coordinates between point, box, quad and polygon marks.
    """
    for name in _COORDINATE_MARKS:
        before, *blocks = text.split(f"<|{name}_start|>")
        text = before + "".join(block.partition(f"<|{name}_end|>")[2] for block in blocks)
    intervals: list[Interval] = []
    previous_end = None
    for match in _PAIR.finditer(text):
        continues = previous_end is not None and _COMMA.fullmatch(text, previous_end, match.start())
        if not continues and not _OPENING.search(text, max(0, match.start() - 24), match.start()):
            previous_end = None
            continue
        previous_end = match.end()
        start, end = to_seconds(match.group(1)), to_seconds(match.group(2))
        if start <= end:
            intervals.append((start, end))
    return intervals if intervals or _EMPTY.search(text) else None


def to_seconds(time: str) -> float:
    """Seconds of "75.5", "1:15.5" or "0:01:15.5"; raises KeyeError for anything else."""
    if not re.fullmatch(_TIME, time):
        raise KeyeError(f"{time[:40]!r} is not a valid time: write seconds, mm:ss or hh:mm:ss.")
    seconds = 0.0
    for field_ in time.split(":"):
        seconds = seconds * 60 + float(field_)
    return seconds


def format_seconds(seconds: float) -> str:
    """A time for people, with one decimal: "7.5 s" below a minute, then "1:07.5" and "1:00:07.5"."""
    tenths = round(seconds * 10)
    sign, tenths = ("-" if tenths < 0 else ""), abs(tenths)
    if tenths < 600:
        return f"{sign}{tenths / 10:.1f} s"
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{sign}{clock}:{tenths / 10:04.1f}"


def merge_intervals(intervals: Iterable[Sequence[float]]) -> list[Interval]:
    """The same time as sorted intervals that neither overlap nor touch."""
    merged: list[Interval] = []
    for start, end in sorted((float(start), float(end)) for start, end in intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
