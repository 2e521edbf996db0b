"""Temporal grounding: when does the described event happen? The score of a reply is its intersection over union with
the annotated span.

A gold span of no length scores 1 for the very same moment and 0 for any other reply; a reply of no length scores 0
against a span that has one. A gold span that ends before it begins counts as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keye.errors import KeyeError, is_number
from keye.evals.data.files import DataFolder, parse_list
from keye.evals.tables import TableTask, text_part, video_part
from keye.evals.task import STRICT, EvalItem, ItemScore, ScoredItem, Summary, TaskSettings, mean_percent, split_gold
from keye.scoring.metrics import interval_iou
from keye.scoring.official.registry import Document
from keye.scoring.strict.spans import find_span

LEVELS = (0.3, 0.5, 0.7)


@dataclass(frozen=True, kw_only=True)
class Grounding(TableTask):
    """Questions for one span of a video. `metric` is the mean IoU; the shares of replies with at least 0.3, 0.5 and 0.7
    stand beside it."""

    metric: str = "mIoU"

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """One item for each query of a video (the authors' JSON), or the one of a row (the copy of lmms-eval)."""
        if "queries" not in row:
            span = row["span"]
            yield self._item(folder, str(row["video_path"]), str(row["query"]), span, row.get("duration"))
            return
        spans, queries = parse_list(row["spans"], "spans"), parse_list(row["queries"], "queries")
        if len(spans) != len(queries):
            raise KeyeError(f"the video has {len(spans)} spans and {len(queries)} queries; each query needs its span")
        for span, query in zip(spans, queries, strict=True):
            yield self._item(folder, str(row["_key"]), str(query), span, row.get("duration"))

    def _item(self, folder: DataFolder, video: str, query: str, span: Any, duration: Any) -> EvalItem:
        pair = read_span(span)
        query = " ".join(query.split()).removesuffix(".")
        document: dict[str, Any] = {"video": video, "query": query, "span": list(pair) if pair else None}
        if is_number(duration):
            document["duration"] = float(duration)
        where = folder.locate(video, within="videos")
        return EvalItem(
            f"{video}>{query}>{span}", video, (video_part(where), text_part(_PROMPT.format(query=query))), document,
            {"length": _length_group(duration)}, has_gold=pair is not None,
        )  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """IoU of the one span that the reply says."""
        span = find_span(prediction, duration=document.get("duration"))
        gold = document.get("span")
        iou = interval_iou([span], [(gold[0], gold[1])]) if span and gold else 0.0
        return ItemScore(iou, list(span) if span else None)

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """TimeLens gives `iou`, its training code `reward`."""
        score = super().read_fields(fields, document)
        value = 0.0 if fields.get("error") else float(fields.get("iou", fields.get("reward", 0.0)))
        return replace(score, score=value)

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """Mean IoU, and the shares of items of at least some IoU."""
        summary = super().summarise(scored, scorer)
        counted, _ = split_gold(scored)
        hits = {
            f"R1@{level}": mean_percent([replace(entry, score=float(entry.score >= level)) for entry in counted])
            for level in LEVELS
        }
        shares = {name: value for name, value in hits.items() if value is not None}
        return replace(summary, parts={"recall": shares, **summary.parts})


_PROMPT = (
    "When does this happen in the video: '{query}'? Find where it starts and ends, and reply in the form: "
    "'The event happens in <start time> - <end time> seconds'."
)


def read_span(value: Any) -> tuple[float, float] | None:
    """A gold span as (start, end) in seconds, also where it lies in a list of one; None for none, and for one that ends
    before it begins."""
    if value is None or value == []:
        return None
    pair = parse_list(value, "span")
    while len(pair) == 1:
        pair = parse_list(pair[0], "span")
    if len(pair) != 2 or not all(is_number(number) for number in pair):
        raise KeyeError(f"span is {value!r:.60}, not a start and an end in seconds")
    return (float(pair[0]), float(pair[1])) if pair[0] <= pair[1] else None


def _length_group(duration: Any) -> str:
    """Lengths of videos as reports part them."""
    if not is_number(duration):
        return "unknown"
    return next((name for limit, name in ((60, "< 1 min"), (180, "1-3 min"), (600, "3-10 min")) if duration < limit),
                "> 10 min")  # fmt: skip


def _timelens(part: str, title: str, rows: int | None) -> Grounding:
    return Grounding(
        name=f"timelens_{part}", title=f"{title}-TimeLens", measures="when a described event happens in a video",
        source="TencentARC/TimeLens-Bench", licence="BSD-3 style; videos under the terms of their source sets",
        gate=None, media="video", dimension="Video", scored_as="timelens",
        official=("timelens-5d90c06", "lmms-eval-0.7.3", "lmms-eval-0.7.3-cli", "timelens-train-5d90c06"),
        tables=(rf"{part}-timelens\.json", rf"{part}[^/]*\.parquet", rf"{part}[^/]*\.jsonl?"),
        layouts=(("queries", "spans"), ("video_path", "query", "span")), rows=rows,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExtremeWhen(Grounding):
    """Videos of an hour and more, which come from other benchmarks: they may lie anywhere below the folder."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        pair, video, question = read_span(row["correct_interval"]), str(row["video_id"]), str(row["question"])
        seconds = row.get("video_duration_s")
        duration = float(seconds) if seconds is not None and is_number(seconds) else None
        document: dict[str, Any] = {"video": video, "query": question, "span": list(pair) if pair else None}
        if duration is not None:
            document["duration"] = duration
        hours = None if duration is None else int(duration // 3600)
        labels = {
            "source": str(row["source_corpus"]),
            "length": "unknown" if hours is None else f"{hours}-{hours + 1} h" if hours < 3 else "> 3 h",
        }  # fmt: skip
        prompt = _PROMPT.format(query=" ".join(question.split()))
        where = folder.locate(video, within=str(row["source_corpus"]))
        yield EvalItem(
            str(row["qid"]), f"{row['source_corpus']}/{video}", (video_part(where), text_part(prompt)), document,
            labels, has_gold=pair is not None,
        )  # fmt: skip


TASKS = (
    ExtremeWhen(
        name="extremewhenbench",
        title="ExtremeWhenBench",
        measures="when an event happens in hours of video",
        source="min1321/extreme-when-bench",
        licence="Apache-2.0 (task); videos of LVBench, MLVU and Video-MME",
        media="video",
        dimension="Video",
        metric="strict mIoU",
        rows=2273,
        tables=(r"[^/]*test[^/]*\.(?:parquet|jsonl?)", r"[^/]*\.(?:parquet|jsonl?)"),
        layouts=(("qid", "video_id", "source_corpus", "question", "correct_interval"),),
    ),
    _timelens("charades", "Charades", 3363),
    _timelens("activitynet", "ActivityNet", None),
    _timelens("qvhighlights", "QVHighlights", None),
)
