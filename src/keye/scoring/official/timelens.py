"""TimeLens: one interval of a video. Its evaluation script, its training reward, and lmms-eval's copy.

All three take the first two times of a reply, whatever they mean; only the training reward looks at `<answer>` first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from keye.scoring.official.registry import Document, Fields, register

Span = tuple[float, float]

_CLOCK: Final = re.compile(r"\b(?:(\d{1,2}):(\d{2})|(\d{1,2})):(\d{2}(?:\.\d+)?)\b")
#: A number starts no earlier than its first digit: long runs of digits are read once, not once per digit.
_NUMBER: Final = r"(?<!\d)(\d+(?:\.\d*)?)"
_END: Final = r"(\d+(?:\.\d*)?)"
_DASH: Final = re.compile(rf"{_NUMBER}\s*-\s*{_END}")
_TO: Final = re.compile(rf"{_NUMBER}\s+to\s+{_END}")
_BARE: Final = re.compile(r"\b\d+(?:\.\d+)?\b")
_TAGGED: Final = re.compile(r"<think>.*?</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_THRESHOLDS: Final = (0.3, 0.5, 0.7)


def _find_spans(text: str, *, replace_to: bool) -> list[Span]:
    """Clock times in pairs; without any, `a - b`, then `a to b`, then bare numbers in pairs.

    `replace_to` reads every "to" as a dash, also that of "tomato": the rule of the training reward.
    """
    text = text.lower()
    if replace_to:
        text = text.replace("to", "-")
    spans = _pair([_to_seconds(match) for match in _CLOCK.finditer(text)])
    for pattern in (_DASH, _TO):
        if not spans:
            spans = [(float(start), float(end)) for start, end in pattern.findall(text)]
    return spans or _pair([float(number) for number in _BARE.findall(text)])


def _to_seconds(clock: re.Match[str]) -> float:
    hours, minutes, only_minutes, seconds = clock.groups()
    return int(hours or 0) * 3600 + int(minutes or only_minutes) * 60 + float(seconds)


def _pair(times: Sequence[float]) -> list[Span]:
    """An odd last time is dropped."""
    return list(zip(times[::2], times[1::2], strict=False))


def _iou(predicted: Span, gold: Span) -> float:
    """Length from the latest start to the earliest end, over that from the earliest start to the latest end.

    `ZeroDivisionError` where all four are one moment.
    """
    common = max(min(predicted[1], gold[1]) - max(predicted[0], gold[0]), 0)
    return common / (max(predicted[1], gold[1]) - min(predicted[0], gold[0]))


def _gold(document: Document) -> Span:
    """`TypeError` for a row without a gold interval."""
    start, end = document["span"]
    return float(start), float(end)


def _script_iou(document: Document, spans: Sequence[Span]) -> float:
    """The script scores a reply without times as the interval -100 to -100."""
    return _iou(spans[0] if spans else (-100, -100), _gold(document))


def _lmms_iou(document: Document, spans: Sequence[Span]) -> float:
    if document["span"] is None:
        return 0.0
    gold = _gold(document)
    if not spans or max(spans[0][1], gold[1]) <= min(spans[0][0], gold[0]):
        return 0.0
    return _iou(spans[0], gold)


def _as_lists(spans: Sequence[Span]) -> list[list[float]]:
    return [list(span) for span in spans]


@register("timelens", "item", "timelens-5d90c06")
def score_script_item(document: Document, prediction: str) -> Fields:
    spans = _find_spans(prediction, replace_to=False)
    try:
        return {"extracted": _as_lists(spans), "iou": _script_iou(document, spans)}
    except (ZeroDivisionError, TypeError) as error:
        return {"extracted": _as_lists(spans), "error": type(error).__name__}


@register("timelens", "item", "lmms-eval-0.7.3")
def score_lmms_item(document: Document, prediction: str) -> Fields:
    spans = _find_spans(prediction, replace_to=False)
    iou = _lmms_iou(document, spans)
    return {"extracted": _as_lists(spans), "iou": iou, "miou": iou * 100}


@register("timelens", "item", "timelens-train-5d90c06")
def score_training_item(document: Document, prediction: str) -> Fields:
    """An interval that doesn't end after its start is worth nothing."""
    tagged = _TAGGED.match(prediction)
    answer = tagged.group(1) if tagged else prediction
    spans = _find_spans(answer, replace_to=True)
    fields: Fields = {"answer": answer, "extracted": _as_lists(spans)}
    if not spans or spans[0][0] >= spans[0][1]:
        return {**fields, "reward": 0}
    if document["span"] is None:
        return {**fields, "error": "TypeError"}
    return {**fields, "reward": _iou(spans[0], _gold(document))}


@register("timelens", "aggregate", "timelens-5d90c06")
def score_script_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    try:
        ious = [_script_iou(row, _find_spans(text, replace_to=False)) for row, text in _merge_rows(items)]
        recalls = {f"R1@{limit}": sum(iou >= limit for iou in ious) * 100 / len(ious) for limit in _THRESHOLDS}
        return {"metrics": {**recalls, "mIoU": sum(ious) * 100 / len(ious)}}
    except (ZeroDivisionError, TypeError) as error:
        return {"error": type(error).__name__}


@register("timelens", "aggregate", "lmms-eval-0.7.3")
def score_lmms_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    """Rows without a gold interval leave the denominator."""
    rows = [(row, text) for row, text in _merge_rows(items) if row["span"] is not None]
    ious = [_lmms_iou(row, _find_spans(text, replace_to=False)) for row, text in rows]
    count = max(len(ious), 1)
    recalls = {f"IOU@{int(limit * 10)}": sum(iou >= limit for iou in ious) * 100 / count for limit in _THRESHOLDS}
    return {"metrics": {**recalls, "mIOU": sum(ious) * 100 / count}}


def _merge_rows(items: Sequence[tuple[Document, Any]]) -> list[tuple[Document, str]]:
    """Rows of the same video, query and span count once, with the last of their replies.

    Documents that name no video and query are rows of their own.
    """
    rows: dict[str, tuple[Document, str]] = {}
    for place, (document, prediction) in enumerate(items):
        is_named = "video" in document and "query" in document
        key = [document["video"], document["query"], document["span"]] if is_named else [place]
        rows[json.dumps(key)] = (document, prediction)
    return list(rows.values())
