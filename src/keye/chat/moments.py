"""Which times in a reply can be moments of the video: those that were looked at. Knows intervals and plans."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from keye.chat.grounding import Region
from keye.chat.times import Interval, format_seconds
from keye.errors import KeyeWarning

#: Times in replies have one decimal.
_ROUNDING: Final = 0.051
#: Times that one note lists.
_LISTED: Final = 3


@dataclass(frozen=True)
class Window:
    """From when to when a video was looked at, in seconds as the model counts them. Where players count otherwise, they
    show what the model sees at `counted` is, ascending, at `shown`."""

    start: float
    end: float
    counted: tuple[float, ...] = ()
    displayed: tuple[float, ...] = ()

    def to_shown(self, seconds: float) -> float:
        """A time as players count it, where they count otherwise: between two known times evenly, before the first and
        after the last as far from them as the model says."""
        place = bisect_right(self.counted, seconds)
        before = max(place - 1, 0)
        rate = 1.0
        if 0 < place < len(self.counted):
            rate = (self.displayed[place] - self.displayed[before]) / (self.counted[place] - self.counted[before])
        return round(self.displayed[before] + (seconds - self.counted[before]) * rate, 3)


def collect_windows(plans: Iterable[Mapping[str, Any]], *, relative: bool = False) -> tuple[Window, ...]:
    """The windows in which the frames of each video were sampled: the `part` of its plan, else from its
    first sampled frame until the last one makes way for the next. `relative` counts them from the first sampled frame,
    for a model that sees no absolute times. Plans without times (images, frames of unknown times) have no window."""
    return tuple(window for plan in plans if (window := _window(plan, relative)) is not None)


def _window(plan: Mapping[str, Any], relative: bool) -> Window | None:
    times = plan.get("label_times") or plan.get("timestamps")
    if not times:
        return None
    first, last = float(times[0]), float(times[-1])
    part: Sequence[float] = plan.get("part") or ()
    if len(part) == 2 and not plan.get("label_times"):
        start, end = part
        return Window(max(start - first, 0.0), end - first, (0.0,), (first,)) if relative else Window(start, end)
    rate = plan.get("sample_fps")
    step = (last - first) / (len(times) - 1) if len(times) > 1 else 0.0
    end = last + max(step, 1 / rate if rate else 1.0)
    if plan.get("duration") is not None and not plan.get("label_times"):
        end = max(last, min(end, float(plan["duration"])))
    if relative:
        return Window(0.0, end - first, (0.0,), (float(plan["timestamps"][0]),))
    if plan.get("label_times"):
        return Window(first, end, tuple(times), tuple(plan["timestamps"]))
    return Window(first, end)


def keep_moments(intervals: Sequence[Interval], windows: Sequence[Window]) -> tuple[list[Interval], list[KeyeWarning]]:
    """The intervals that are moments of the video, each once, in seconds that players show, and a note on each kind of
    others.

    Left out are intervals without length, and those outside every window; one that reaches beyond the windows is cut to
    them. Without windows only the first rule holds: then no time is known to have been looked at or not.
    """
    inside: dict[Interval, None] = {}
    empty, outside, cut = [], [], []
    for start, end in intervals:
        if not start < end:
            empty.append((start, end))
            continue
        within = _within((start, end), windows)
        if within is None:
            outside.append((start, end))
            continue
        (low, high), window = within
        if window is not None and window.counted:
            inside[window.to_shown(low), window.to_shown(high)] = None
        else:
            inside[low, high] = None
        if max(abs(low - start), abs(high - end)) > _ROUNDING:
            cut.append((start, end))
    looked = f"what was looked at ({_spans([(window.start, window.end) for window in windows])})"
    notes = [
        KeyeWarning(f"the reply names {_spans(spans)}: {fault}")
        for spans, fault in (
            (empty, "without length, so not shown as a moment"),
            (outside, f"outside {looked}, so not shown as a moment"),
            (cut, f"in part outside {looked}, and cut to it"),
        )
        if spans
    ]
    return list(inside), notes


def keep_regions(regions: Sequence[Region], windows: Sequence[Window]) -> list[Region]:
    """The marked places, without clips that are no moments; clips that reach beyond the windows are cut to them, and
    have seconds that players show."""
    inside = []
    for region in regions:
        if region.interval is None:
            inside.append(region)
        elif moments := keep_moments([region.interval], windows)[0]:
            inside.append(replace(region, interval=moments[0]))
    return inside


def _within(interval: Interval, windows: Sequence[Window]) -> tuple[Interval, Window | None] | None:
    """The interval cut to the window with which it shares most, and that; None if it shares no more with any than
    rounding makes of nothing."""
    if not windows:
        return interval, None
    start, end = interval
    parts = [(max(start, window.start), min(end, window.end), window) for window in windows]
    low, high, window = max(parts, key=lambda part: part[1] - part[0])
    if high <= low or (high - low < _ROUNDING and high - low < end - start):
        return None
    # What rounding to a tenth of a second adds does not count as excess.
    return (start if low - start <= _ROUNDING else low, end if end - high <= _ROUNDING else high), window


def _spans(intervals: Sequence[Interval]) -> str:
    spans = list(dict.fromkeys(f"{format_seconds(start)} to {format_seconds(end)}" for start, end in intervals))
    more = f" and {len(spans) - _LISTED} more" if len(spans) > _LISTED else ""
    return ", ".join(spans[:_LISTED]) + more
