"""Scores of searches in long video: ranked moments against the one interval in which an event happens, or against none.

Pure functions of numbers; knows no model and no files. Times are seconds, scores lie between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keye.chat.times import Interval
from keye.scoring.metrics import interval_iou

#: A moment is a hit when its middle is at most this many seconds away from the event, as in LV-Haystack.
HIT_SECONDS = 5.0
#: Bins of equal width over which calibration is measured.
CALIBRATION_BINS = 10


def is_hit(ranked: Sequence[Interval], gold: Interval, count: int, tolerance: float = HIT_SECONDS) -> bool:
    """Whether the middle of one of the first `count` moments lies within `tolerance` seconds of the event."""
    middles = [(start + end) / 2 for start, end in ranked[:count]]
    return any(gold[0] - tolerance <= middle <= gold[1] + tolerance for middle in middles)


def first_iou(ranked: Sequence[Interval], gold: Interval) -> float:
    """Intersection over union of the first moment and the event; no moment scores 0."""
    return interval_iou(ranked[:1], [gold])


def calibration_error(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: the mean over bins of equal width of |share that came true - mean probability|, each
    weighted by how many probabilities it holds. NaN without any."""
    if not probabilities:
        return math.nan
    chances, truths = np.array(probabilities, float), np.array(outcomes, float)
    places = np.minimum((chances * bins).astype(int), bins - 1)
    gaps = [abs(float((truths[places == place] - chances[places == place]).sum())) for place in range(bins)]
    return sum(gaps) / len(chances)


@dataclass(frozen=True)
class Ceiling:
    """What a perfect model reaches that looks at evenly spaced frames once: the share of events of which it sees a
    frame, the mean IoU, and the share of answers with IoU of at least 0.5."""

    seen: float
    miou: float
    recall: float


def one_pass_ceiling(length: float, spacing: float, phases: int = 20_000) -> Ceiling:
    """The ceiling for an event of `length` seconds that begins anywhere between two frames `spacing` seconds apart. The
    model knows of each frame whether it shows the event, and answers with borders half-way between two frames."""
    begins = (np.arange(phases) + 0.5) / phases * spacing  # the first frame after the event's start is at `spacing`
    ends = begins + length
    first, last = np.ceil(begins / spacing), np.ceil(ends / spacing) - 1
    seen = last >= first
    low, high = (first - 0.5) * spacing, (last + 0.5) * spacing
    common = np.minimum(ends, high) - np.maximum(begins, low)
    union = np.maximum(ends, high) - np.minimum(begins, low)
    ious = np.where(seen, np.maximum(common, 0) / union, 0.0)
    return Ceiling(float(seen.mean()), float(ious.mean()), float((ious >= 0.5).mean()))


def best_spans(
    times: Sequence[float], scores: Sequence[float] | NDArray[np.floating], count: int, width: float
) -> list[Interval]:
    """The `count` best spans of `width` seconds: each around the frame of the highest score that is at least `width`
    seconds away from those before. `times` are the seconds of the frames."""
    clock, left = np.array(times, float), np.array(scores, float)
    spans: list[Interval] = []
    while len(spans) < count and np.isfinite(left).any():
        middle = clock[int(np.nanargmax(np.where(np.isfinite(left), left, np.nan)))]
        spans.append((float(middle - width / 2), float(middle + width / 2)))
        left[np.abs(clock - middle) < width] = -math.inf
    return spans


def overlaps(spans: Sequence[Interval], gold: Interval) -> bool:
    """Whether one of the spans shares time with the event."""
    return any(start < gold[1] and gold[0] < end for start, end in spans)


def random_span_recall(duration: float, length: float, count: int, width: float) -> float:
    """The chance that `count` spans of `width` seconds, placed at random without overlap, meet an event of `length`."""
    return min(1.0, count * (width + length) / duration) if duration > 0 else 1.0


def pick_threshold(present: Sequence[float], absent: Sequence[float], recall: float = 0.9) -> float:
    """The probability from which on to answer: the one that keeps at least `recall` of the `present` events with the
    fewest false alarms of the `absent` ones, half-way to the next lower number that occurs."""
    best = sorted(present, reverse=True)[: max(1, math.ceil(recall * len(present)))]
    lowest = best[-1]
    below = [value for value in (*present, *absent) if value < lowest]
    return (lowest + max(below)) / 2 if below else lowest
