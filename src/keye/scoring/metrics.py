"""Scores of answers: time intervals by intersection over union, times by their number, everything else by its text.

Pure functions of text and numbers; knows no model. All scores lie between 0 and 1.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keye.chat.times import Interval, merge_intervals

#: Seconds above this are no time of a video.
MAX_SECONDS = 1e9
_TIME = re.compile(r"(\d+(?:\.\d+)?)(?: ?s| seconds?)?\.?")


def parse_interval_answer(text: str) -> list[Interval] | None:
    """The intervals of `[[3.5, 7.0], [9.0, 11.5]]`, merged and sorted; empty for `[]`; None for a malformed answer.

    Strict, unlike `keye.chat.times.parse_intervals`: anything but a JSON list of pairs of seconds with 0 <= start <=
    end is malformed.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return None
    if not all(_is_seconds(start) and _is_seconds(end) and start <= end for start, end in value):
        return None
    return merge_intervals(value)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS


def interval_iou(predicted: Sequence[Interval] | None, gold: Sequence[Interval]) -> float:
    """Intersection over union of two sets of intervals in seconds; None (malformed) scores 0.

    An empty prediction for an empty gold scores 1, any other empty side 0. Where both have no length at all (single
    moments), equal sets score 1.
    """
    if predicted is None:
        return 0.0
    ours, theirs = merge_intervals(predicted), merge_intervals(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum(max(0.0, min(b, d) - max(a, c)) for a, b in ours for c, d in theirs)
    union = _length(ours) + _length(theirs) - common
    return common / union if union > 0 else float(ours == theirs)


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def text_matches(predicted: str, gold: str) -> bool:
    """Whether the texts are equal but for case, spaces and a final full stop."""
    return _normalised(predicted) == _normalised(gold)


def time_matches(predicted: str, gold: str) -> bool:
    """Whether both say the same time when rounded to the one decimal that answers have ("12.5 seconds")."""
    ours, theirs = _TIME.fullmatch(predicted.strip()), _TIME.fullmatch(gold.strip())
    return ours is not None and theirs is not None and f"{float(ours[1]):.1f}" == f"{float(theirs[1]):.1f}"


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


@dataclass(frozen=True)
class Constant:
    """The best that can be reached on a task without looking: one answer for every question, and its mean score."""

    answer: str
    score: float


def majority(answers: Sequence[str]) -> Constant:
    """The most frequent answer and its share; the first in the alphabet among equals. At least one answer."""
    counts = Counter(_normalised(answer) for answer in answers)
    answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return Constant(answer, count / len(answers))


def mean(values: Sequence[float]) -> float:
    """The mean, NaN for no values."""
    return sum(values) / len(values) if values else math.nan


def clustered_error(groups: Sequence[Sequence[tuple[Any, float]]]) -> float:
    """Standard error of the unweighted mean of the groups' means, when observations of one cluster go together.

    Each group (a task) is a list of (cluster, value); a cluster is a clip, whose questions stand or fall together.
    Linearised: each value adds (value - mean of group) / (size of group * groups) to its cluster, and the error is the
    root of the sum of the clusters' squares. NaN without values, and of a single cluster: one clip says nothing of how
    clips differ.
    """
    filled = [group for group in groups if group]
    if len({cluster for group in filled for cluster, _ in group}) < 2:
        return math.nan
    influence: defaultdict[Any, float] = defaultdict(float)
    for group in filled:
        center = mean([value for _, value in group])
        for cluster, value in group:
            influence[cluster] += (value - center) / (len(group) * len(filled))
    return math.sqrt(sum(total * total for total in influence.values()))
