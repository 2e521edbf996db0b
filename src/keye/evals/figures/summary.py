"""Scored answers to figures: accuracy over tasks, grounding, what a constant answer would reach, standard errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from keye.scoring import metrics
from keye.scoring.metrics import Constant
from keye.scoring.search import calibration_error

#: Tasks whose mean is the headline accuracy: those that the model card vouches for.
SHIPPED_TASKS = (
    "ground", "ground_text", "start", "end", "count", "count_at", "attribute_at", "list_at", "visible_at", "order",
    "read", "presence", "color_change", "change_time", "background",
)  # fmt: skip
#: Tasks whose intervals make the headline mIoU.
GROUNDING_TASKS = ("ground", "ground_text")
NEVER_TASK = "ground_none"
PRESENCE_TASKS = ("presence", "presence_text")
IOU_LEVELS = (0.3, 0.5, 0.7)
#: An interval task counts as answered from this IoU on.
HIT_IOU = 0.5
WHOLE_VIDEO = "(the whole video)"


@dataclass(frozen=True)
class Scored:
    """One answer with its scores. `cluster` numbers the clip; `iou` and `whole_video_iou` (of answering with the whole
    video) are those of interval tasks, None elsewhere; `exact` is the match of text, number or all intervals. `yes` is
    the probability of "yes" where that or "no" is the answer."""

    cluster: int
    task: str
    question: str
    gold: str
    reply: str
    exact: bool
    iou: float | None = None
    whole_video_iou: float | None = None
    yes: float | None = None

    @property
    def correct(self) -> float:
        """1 or 0: IoU of at least 0.5 for intervals, else the exact match."""
        return float(self.exact if self.iou is None else self.iou >= HIT_IOU)


def summarise(scored: Sequence[Scored], shipped: Sequence[str] = SHIPPED_TASKS) -> dict[str, Any]:
    """Figures of a run as plain data; all scores 0 to 100, None where nothing was asked.

    accuracy: mean over the shipped tasks (those that were asked) of each task's accuracy, which for interval tasks is
        R1@0.5, the share of answers with IoU >= 0.5.
    miou: mean IoU over ground and ground_text. miou_with_none: also over ground_none, where `[]` scores 1.
    *_error: standard errors with clips as clusters, None for a single clip.
    grounding: R1 at three IoU levels, and the same figures for always answering with the whole video.
    presence: of the questions whether something is there, n, accuracy, and how far the probability of yes is from the
        share of yes (calibration_error, 0 to 1).
    tasks: for each task n, accuracy, its error, the metric, the best constant answer (majority_answer) with its
        accuracy (majority), whether it is shipped; interval tasks also miou and exact. ground and ground_none
        share one pool of constant answers, since the model cannot know which of the two it is asked.
    """
    by_task: dict[str, list[Scored]] = defaultdict(list)
    for answer in scored:
        by_task[answer.task].append(answer)
    counted = [by_task[task] for task in shipped if task in by_task]
    located = [answer for task in GROUNDING_TASKS for answer in by_task.get(task, [])]
    with_none = [*located, *by_task.get(NEVER_TASK, [])]
    return {
        "accuracy": _mean_percent(_accuracy(items) for items in counted),
        "accuracy_error": _percent(metrics.clustered_error([_clusters(items, correct=True) for items in counted])),
        "miou": _mean_percent(_ious(located)),
        "miou_error": _percent(metrics.clustered_error([_clusters(located, correct=False)])),
        "miou_with_none": _mean_percent(_ious(with_none)),
        "whole_video_miou": _mean_percent(_whole_video_ious(located)),
        "grounding": {
            "n": len(located),
            **{
                f"{prefix}r1@{level}": _mean_percent(float(iou >= level) for iou in ious)
                for prefix, ious in (("", _ious(located)), ("whole_video_", _whole_video_ious(located)))
                for level in IOU_LEVELS
            },
        },
        "presence": _presence([answer for task in PRESENCE_TASKS for answer in by_task.get(task, [])]),
        "tasks": {task: _task(task, by_task, shipped) for task in sorted(by_task)},
        "questions": len(scored),
        "clips": len({answer.cluster for answer in scored}),
    }


def _presence(items: Sequence[Scored]) -> dict[str, Any]:
    """Questions whether something is there: how many answers are right, of those to be answered by yes and by no, and
    the expected calibration error of the probability of yes (0 to 1)."""
    sides = {gold: [answer for answer in items if answer.gold == gold] for gold in ("yes", "no")}
    known = [(answer.yes, answer.gold == "yes") for answer in items if answer.yes is not None]
    error = calibration_error([yes for yes, _ in known], [gold for _, gold in known]) if known else None
    return {
        "n": len(items), "accuracy": _percent(_accuracy(items)),
        **{f"accuracy_{gold}": _percent(_accuracy(side)) for gold, side in sides.items()},
        "calibration_error": None if error is None else round(error, 4),
    }  # fmt: skip


def _task(task: str, by_task: dict[str, list[Scored]], shipped: Sequence[str]) -> dict[str, Any]:
    items = by_task[task]
    constant = _best_constant(task, by_task)
    figures = {
        "n": len(items), "accuracy": _percent(_accuracy(items)),
        "error": _percent(metrics.clustered_error([_clusters(items, correct=True)])),
        "metric": "exact match" if items[0].iou is None else f"r1@{HIT_IOU}", "majority_answer": constant.answer,
        "majority": _percent(constant.score), "shipped": task in shipped,
    }  # fmt: skip
    if items[0].iou is not None:
        figures["miou"] = _mean_percent(_ious(items))
        figures["exact"] = _mean_percent(float(answer.exact) for answer in items)
    return figures


def _best_constant(task: str, by_task: dict[str, list[Scored]]) -> Constant:
    """The most frequent gold answer or, where it is better, the whole video."""
    together = ("ground", NEVER_TASK) if task in ("ground", NEVER_TASK) else (task,)
    pool = [answer for name in together for answer in by_task.get(name, [])]
    best = metrics.majority([answer.gold for answer in pool])
    if with_whole_video := _whole_video_ious(by_task[task]):
        score = metrics.mean([float(iou >= HIT_IOU) for iou in with_whole_video])
        best = max(best, Constant(WHOLE_VIDEO, score), key=lambda constant: constant.score)
    return best


def _accuracy(items: Sequence[Scored]) -> float:
    return metrics.mean([answer.correct for answer in items])


def _clusters(items: Sequence[Scored], *, correct: bool) -> list[tuple[int, float]]:
    return [(answer.cluster, answer.correct if correct else answer.iou or 0.0) for answer in items]


def _ious(items: Iterable[Scored]) -> list[float]:
    return [answer.iou for answer in items if answer.iou is not None]


def _whole_video_ious(items: Iterable[Scored]) -> list[float]:
    return [answer.whole_video_iou for answer in items if answer.whole_video_iou is not None]


def _mean_percent(shares: Iterable[float]) -> float | None:
    return _percent(metrics.mean(list(shares)))


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else round(100 * share, 2)
