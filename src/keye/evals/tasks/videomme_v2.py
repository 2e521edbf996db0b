"""Video-MME-v2: eight options, and questions in groups of four about a video whose points grow faster than the number
of right answers.

Group points: with `relevance` groups 100 (n/4)^2 of n right answers; `logic` groups count the right answers before the
first wrong one, by the group's structure. Rules for data that are not as published: a group that lacks one of its
questions, or has one twice, has no points and is named; a question that failed is wrong.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError
from keye.evals.choices import LETTER_ONLY, REASON_FIRST, ChoiceTask, gold_letter
from keye.evals.data.files import DataFolder, parse_literal
from keye.evals.tables import text_part, video_part
from keye.evals.task import STRICT, EvalItem, ScoredItem, Summary, TaskSettings, mean_percent, split_gold

_SQUARES: Final = (0, 6.25, 25, 56.25, 100)
_MIDDLE_PAIR: Final = (0, 100 / 12, 400 / 12, 700 / 12, 100)
_FIRST_PAIR: Final = (0, 10, 20, 50, 100)
#: The data write kinds of groups in English or in Chinese.
_KINDS: Final = {
    "relevance": "relevance",
    "logic": "logic",
    "相关性": "relevance",
    "一致性": "relevance",
    "逻辑": "logic",
    "逻辑链": "logic",
}


@dataclass(frozen=True, kw_only=True)
class VideoMMEv2(ChoiceTask):
    """Groups of four questions; `metric` is the mean of the groups' points, accuracy over questions stands beside."""

    metric: str = "Non-Lin"

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        video = str(row["video_id"])
        names = (
            "video_id",
            "question_id",
            "options",
            "answer",
            "level",
            "second_head",
            "third_head",
            "group_structure",
        )
        kind = str(row["group_type"]).strip()
        document: dict[str, Any] = {
            **{name: row.get(name) for name in names},
            "group_type": _KINDS.get(kind.lower(), kind),
        }
        text = f"{row['question']}\n{row['options']}\n{REASON_FIRST if settings.reasoning else LETTER_ONLY}"
        if settings.subtitles:
            text = f"{_subtitles(folder, video)}{text}"
        labels = {
            "level": str(row.get("level")), "group type": document["group_type"],
            "second head": str(row.get("second_head")), "third head": str(row.get("third_head")),
        }  # fmt: skip
        yield EvalItem(
            str(row["question_id"]), video, (video_part(folder.locate(f"{video}.mp4")), text_part(text)), document,
            labels, has_gold=gold_letter(document) is not None,
        )  # fmt: skip

    def official_input(self, scored: Sequence[ScoredItem]) -> dict[str, Any]:
        """Theirs read scored rows in the order of the data."""
        return {"records": [{**entry.item.document, "score": int(entry.score >= 1)} for entry in scored]}

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """The mean of the groups' points; `groups` in the parts are those by kind, level and heads of the group, which
        are those of its last question; `accuracy` is that of the questions."""
        counted, notes = split_gold(scored)
        groups: dict[str, list[ScoredItem]] = defaultdict(list)
        for entry in counted:
            groups[entry.item.cluster].append(entry)
        points: dict[str, float] = {}
        tables: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for video, entries in groups.items():
            ordered = sorted(entries, key=lambda entry: _number_of(entry.item.id))
            if [_number_of(entry.item.id) for entry in ordered] != [1, 2, 3, 4]:
                continue
            points[video] = score_group(ordered[0].item.document, [entry.score >= 1 for entry in ordered])
            for label, value in ordered[-1].item.labels.items():
                tables[f"groups by {label}"][value].append(points[video])
        if len(groups) > len(points):
            lacking = [name for name in groups if name not in points]
            notes = (*notes, f"{len(lacking)} groups do not have each of four questions once and have no points "
                     f"({', '.join(lacking[:3])})")  # fmt: skip
        headline = sum(points.values()) / len(points) if points else None
        accuracy = mean_percent(counted)
        parts = {
            **({} if accuracy is None else {"accuracy": {"questions": accuracy}}),
            **{
                table: {key: sum(of) / len(of) for key, of in sorted(values.items())}
                for table, values in tables.items()
            },
        }  # fmt: skip
        return replace(super().summarise(scored, scorer), value=headline, parts=parts, notes=notes)


def score_group(document: Mapping[str, Any], right: Sequence[bool]) -> float:
    """Points of a group, 0 to 100, from which of its four questions are right."""
    if document["group_type"] == "relevance":
        return _SQUARES[sum(right)]
    leading = next((place for place, value in enumerate(right) if not value), len(right))
    structure = json.dumps(parse_literal(str(document["group_structure"]), "group_structure"))
    if structure == "[1, 2, 3, 4]":
        return _SQUARES[leading]
    if structure == "[1, [2, 3], 4]":
        return _MIDDLE_PAIR[leading + (leading == 1 and right[2])]
    if structure == "[[1, 2], 3, 4]":
        return _FIRST_PAIR[leading + (leading == 0 and right[1])]
    raise KeyeError(f"group_structure is {structure}; groups are [1, 2, 3, 4], [1, [2, 3], 4] or [[1, 2], 3, 4]")


def _number_of(name: str) -> int:
    """The number of a question in its group, the 2 of "001-2"; 0 where there is none, as for a repeated row."""
    last = name.rpartition("-")[2]
    return int(last) if last.isdecimal() else 0


def _subtitles(folder: DataFolder, video: str) -> str:
    path = Path(folder.locate(f"{video}.jsonl", (".jsonl",), within="subtitle"))
    if not path.is_file():
        return ""
    try:
        words = [str(json.loads(line)["text"]) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (ValueError, LookupError, TypeError):
        raise KeyeError(f"{path} is not a file of subtitle words; download it again") from None
    return f"Subtitles of the video:\n{' '.join(words)}\n\n"


TASKS = (
    VideoMMEv2(
        name="videomme_v2", title="Video-MME-v2", measures="consistent understanding: groups of four questions a video",
        source="MME-Benchmarks/Video-MME-v2", licence="academic use only, not to be passed on", media="video",
        dimension="Video", rows=3200, tables=(r"test[^/]*\.parquet", r"[^/]*\.parquet"),
        official=("video-mme-v2-b24176a", "vlmevalkit-e8e78f0", "lmms-eval-0.7.3", "lmms-eval-0.7.3-cli",
                  "lmms-eval-75571cf"),
        layouts=(("video_id", "question_id", "group_type", "group_structure", "question", "options", "answer"),),
    ),
)  # fmt: skip
