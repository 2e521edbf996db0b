"""Which times in a reply can be moments of the video: those that were looked at. Knows intervals and plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from keye.chat import Interval, Region, format_seconds
from keye.errors import KeyeWarning

#: Times in replies have one decimal.
_ROUNDING: Final = 0.051
#: Times that one note lists.
_LISTED: Final = 3


def sampled_windows(plans: Iterable[Mapping[str, Any]], *, relative: bool = False) -> tuple[Interval, ...]:
    """The (start, end) seconds in which the frames of each video were sampled: the `part` of its plan, else from its
    first sampled frame until the last one makes way for the next. `relative` counts them from the first sampled frame,
    for a model that is told no times. Plans without times (images, frames of unknown times) have no window."""
    return tuple(window for plan in plans if (window := _window(plan, relative)) is not None)


def _window(plan: Mapping[str, Any], relative: bool) -> Interval | None:
    times = plan.get("label_times") or plan.get("timestamps")
    if not times:
        return None
    first, last = float(times[0]), float(times[-1])
    part: Sequence[float] = plan.get("part") or ()
    if len(part) == 2 and not plan.get("label_times"):
        return (max(part[0] - first, 0.0), part[1] - first) if relative else (part[0], part[1])
    rate = plan.get("sample_fps")
    step = (last - first) / (len(times) - 1) if len(times) > 1 else 0.0
    end = last + max(step, 1 / rate if rate else 1.0)
    if plan.get("duration") is not None and not plan.get("label_times"):
        end = max(last, min(end, float(plan["duration"])))
    return (0.0, end - first) if relative else (first, end)


def keep_moments(
    intervals: Sequence[Interval], windows: Sequence[Interval]
) -> tuple[list[Interval], list[KeyeWarning]]:
    """The intervals that are moments of the video, and a note on each kind of others.

    Left out are intervals without length, and those outside every window; one that reaches beyond the windows is cut to
    them. Without windows only the first rule holds: then no time is known to have been looked at or not.
    """
    kept: list[Interval] = []
    empty, outside, cut = [], [], []
    for start, end in intervals:
        if not start < end:
            empty.append((start, end))
            continue
        within = _within((start, end), windows)
        if within is None:
            outside.append((start, end))
            continue
        kept.append(within)
        if max(abs(within[0] - start), abs(within[1] - end)) > _ROUNDING:
            cut.append((start, end))
    looked = f"what was looked at ({_spans(windows)})"
    notes = [
        KeyeWarning(f"the reply names {_spans(spans)}: {fault}")
        for spans, fault in (
            (empty, "without length, so not shown as a moment"),
            (outside, f"outside {looked}, so not shown as a moment"),
            (cut, f"in part outside {looked}, and cut to it"),
        )
        if spans
    ]
    return kept, notes


def keep_regions(regions: Sequence[Region], windows: Sequence[Interval]) -> list[Region]:
    """The marked places, without clips that are no moments; clips that reach beyond the windows are cut to them."""
    kept = []
    for region in regions:
        if region.interval is None:
            kept.append(region)
        elif region.interval[0] < region.interval[1] and (within := _within(region.interval, windows)) is not None:
            kept.append(replace(region, interval=within))
    return kept


def _within(interval: Interval, windows: Sequence[Interval]) -> Interval | None:
    """The interval cut to the window with which it shares most, to all of it if windows meet; None if to none."""
    if not windows:
        return interval
    start, end = interval
    parts = [(max(start, first), min(end, last)) for first, last in windows]
    shared = [(low, high) for low, high in parts if high > low]
    if not shared:
        return None
    low, high = max(shared, key=lambda part: part[1] - part[0])
    # What rounding to a tenth of a second adds is no excess.
    return (start if low - start <= _ROUNDING else low), (end if end - high <= _ROUNDING else high)


def _spans(intervals: Sequence[Interval]) -> str:
    listed = [f"{format_seconds(start)} to {format_seconds(end)}" for start, end in intervals[:_LISTED]]
    more = f" and {len(intervals) - _LISTED} more" if len(intervals) > _LISTED else ""
    return ", ".join(listed) + more
