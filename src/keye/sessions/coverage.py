"""An answer about one video in the terms of a search: its intervals as moments, and what was looked at for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keye.chat.times import Interval
from keye.moments import Coverage, Moment, SeenSpan


def moments_of(intervals: Sequence[Interval]) -> list[Moment]:
    """Intervals of a reply in their order, as moments without a probability that were not checked."""
    return [Moment(f"i{rank}", rank, start, end, None) for rank, (start, end) in enumerate(intervals, 1)]


def coverage_of(plans: Sequence[Mapping[str, Any]], query_tokens: int) -> Coverage | None:
    """What of the only video among `plans` (`VideoPlan.to_dict`) was looked at; None for other media. `query_tokens`
    are those of question and reply."""
    if len(plans) != 1 or not plans[0].get("timestamps") or plans[0].get("duration") is None:
        return None
    plan = plans[0]
    times, duration = plan["timestamps"], float(plan["duration"])
    start, end = plan.get("part") or (times[0], duration)
    start, end = max(float(start), 0.0), min(float(end), duration)
    spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else end - start
    unseen = tuple((a, b) for a, b in ((0.0, start), (end, duration)) if b - a > 1e-6)
    seen = (SeenSpan(start, end, round(spacing, 6)),)
    return Coverage(duration, seen, unseen, 0, len(times), int(plan["visual_tokens"]), query_tokens)
