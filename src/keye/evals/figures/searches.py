"""Answers of searches to figures: moments found, borders, false alarms, calibration, costs; films are the clusters.

A row is one question about one film, as plain data that survives a line of JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from keye.chat.times import Interval
from keye.moments import FindResult
from keye.scoring import metrics, search

#: Levels of IoU at which the first moment counts as right.
IOU_LEVELS = (0.3, 0.5, 0.7)
#: The share of events at which false alarms are compared.
RECALL = 0.9


@dataclass(frozen=True)
class SearchRow:
    """One question. `gold` is when the event happens, None where it never does; `ranked` are the moments found, the
    likeliest first, with their `chances`; the first `above` of them are above the model's threshold. `presence` is
    the probability that the event happens at all. `is_first` tells the question that paid for the index. `stages` are
    wall seconds, `cpu` those of all processes."""

    film: int
    name: str
    gold: Interval | None
    ranked: tuple[Interval, ...]
    chances: tuple[float | None, ...]
    above: int
    presence: float | None
    query_tokens: int
    index_tokens: int
    wall: float
    cpu: float
    stages: Mapping[str, float]
    is_first: bool = False

    @classmethod
    def of(
        cls, film: int, name: str, gold: Interval | None, result: FindResult, *, wall: float, cpu: float, is_first: bool
    ) -> Self:
        """The row of a search's result."""
        moments = (*result.moments, *result.weaker)
        return cls(
            film, name, gold, tuple((moment.start, moment.end) for moment in moments),
            tuple(moment.probability for moment in moments), len(result.moments), result.presence,
            result.coverage.query_tokens, result.coverage.index_tokens, wall, cpu, dict(result.seconds), is_first,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The row that `to_dict` wrote."""
        pairs = {"ranked": tuple((start, end) for start, end in values["ranked"])}
        gold = values["gold"]
        return cls(**{**values, **pairs, "gold": None if gold is None else (gold[0], gold[1]),
                      "chances": tuple(values["chances"])})  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def iou(self) -> float:
        """Of the first moment; 0 where there is none."""
        return 0.0 if self.gold is None else search.first_iou(self.ranked, self.gold)

    def is_hit(self, count: int) -> bool:
        """Whether one of the first `count` moments is within 5 s of the event."""
        return self.gold is not None and search.is_hit(self.ranked, self.gold, count)


def summarise_searches(rows: Sequence[SearchRow]) -> dict[str, Any]:
    """Figures of a run as plain data. Scores are per cent, each {"value", "error"}: the standard error has films as
    clusters and is None for a single film.

    present: of questions whose event happens, hit@1 and hit@5 (a moment whose middle is within 5 s), r1@0.3 to 0.7 and
        miou of the first moment, no moment scoring 0; `answered` are those with a moment above the threshold,
        `answered_miou` counts all others as 0.
    absent: `false_alarms`, the share with a moment above the threshold, and `false_alarms_at_recall`, that of the
        threshold on these very rows that keeps 90 % of the present events.
    calibration: expected calibration errors (0 to 1, ten bins of equal width) of `presence` over all questions and of
        the first moment's `chance`, which is right at an IoU of 0.5.
    costs: medians of wall and CPU seconds of first and further questions, and tokens.
    """
    present, absent = [row for row in rows if row.gold is not None], [row for row in rows if row.gold is None]
    scores: dict[str, Callable[[SearchRow], float]] = {
        "hit@1": lambda row: float(row.is_hit(1)), "hit@5": lambda row: float(row.is_hit(5)),
        **{f"r1@{level}": lambda row, level=level: float(row.iou >= level) for level in IOU_LEVELS},  # type: ignore[misc]
        "miou": lambda row: row.iou, "answered": _is_answered,
        "answered_miou": lambda row: row.iou * _is_answered(row),
    }  # fmt: skip
    return {
        "films": len({row.film for row in rows}),
        "present": {"n": len(present), **{name: _figure(present, score) for name, score in scores.items()}},
        "absent": {"n": len(absent), "false_alarms": _figure(absent, _is_answered),
                   **_at_recall(present, absent)},
        "calibration": _calibration(rows),
        "costs": _costs(rows),
    }  # fmt: skip


def _is_answered(row: SearchRow) -> float:
    return float(row.above > 0)


def _figure(rows: Sequence[SearchRow], score: Callable[[SearchRow], float]) -> dict[str, float | None]:
    values = [(row.film, score(row)) for row in rows]
    return {"value": percent(metrics.mean([value for _, value in values])),
            "error": percent(metrics.clustered_error([values]))}  # fmt: skip


def percent(share: float) -> float | None:
    """A share of 1 in per cent, None for NaN."""
    return None if math.isnan(share) else round(100 * share, 2)


def _at_recall(present: Sequence[SearchRow], absent: Sequence[SearchRow]) -> dict[str, Any]:
    with_chance = [[row for row in group if row.presence is not None] for group in (present, absent)]
    if not all(with_chance):
        return {"false_alarms_at_recall": None, "threshold_at_recall": None}
    happens, never = ([row.presence or 0.0 for row in group] for group in with_chance)
    threshold = search.pick_threshold(happens, never, RECALL)
    alarms = _figure(with_chance[1], lambda row: float((row.presence or 0.0) >= threshold))
    return {"false_alarms_at_recall": alarms, "threshold_at_recall": round(threshold, 4)}


def _calibration(rows: Sequence[SearchRow]) -> dict[str, Any]:
    presence = [(row.presence, row.gold is not None) for row in rows if row.presence is not None]
    first = [(row.chances[0], row.iou >= 0.5) for row in rows if row.chances and row.chances[0] is not None]
    return {name: {"n": len(pairs), "error": _rounded(search.calibration_error(*_unzip(pairs)))}
            for name, pairs in (("presence", presence), ("chance", first))}  # fmt: skip


def _unzip(pairs: Sequence[tuple[float | None, bool]]) -> tuple[list[float], list[bool]]:
    return [float(chance or 0.0) for chance, _ in pairs], [outcome for _, outcome in pairs]


def _costs(rows: Sequence[SearchRow]) -> dict[str, Any]:
    shares = [row.query_tokens / max(1, row.index_tokens) for row in rows]
    costs: dict[str, Any] = {
        "query_tokens": {"median": _median([row.query_tokens for row in rows]),
                         "most": max((row.query_tokens for row in rows), default=None)},
        "index_tokens": _median([row.index_tokens for row in rows]),
        "most_query_share": _rounded(max(shares, default=math.nan)),
    }  # fmt: skip
    for name, group in (("first", [r for r in rows if r.is_first]), ("further", [r for r in rows if not r.is_first])):
        costs[name] = {"n": len(group), "wall": _median([row.wall for row in group]),
                       "cpu": _median([row.cpu for row in group]),
                       "most_wall": _rounded(max((row.wall for row in group), default=math.nan)),
                       "most_cpu": _rounded(max((row.cpu for row in group), default=math.nan))}  # fmt: skip
    return costs


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return None
    return _rounded((ordered[middle] + ordered[-middle - 1]) / 2)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
