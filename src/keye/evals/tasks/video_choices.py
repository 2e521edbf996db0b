"""Multiple-choice questions about videos: Video-MME."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from keye.evals.choices import ChoiceTask, ask_letter, gold_letter, plain_options
from keye.evals.files import DataFolder
from keye.evals.tables import text_part, video_part
from keye.evals.task import EvalItem, TaskSettings


@dataclass(frozen=True, kw_only=True)
class VideoMME(ChoiceTask):
    """Four options; by length of the video, domain and kind of question."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        names = ("videoID", "duration", "domain", "sub_category", "task_type", "answer", "question")
        document = {name: row[name] for name in names} | {"options": [str(option) for option in row["options"]]}
        prompt = ask_letter(row["question"], plain_options(document["options"]), reasoning=settings.reasoning)
        labels = {"duration": row["duration"], "domain": row["domain"], "task type": row["task_type"]}
        yield EvalItem(
            str(row["question_id"]), str(row["videoID"]),
            (video_part(folder.locate(f"{row['videoID']}.mp4", within="data")), text_part(prompt)), document, labels,
            has_gold=gold_letter(document) is not None,
        )  # fmt: skip


TASKS = (
    VideoMME(
        name="videomme", title="Video-MME", measures="understanding of videos of seconds to an hour",
        source="lmms-eval/Video-MME", licence="research only", media="video", dimension="Video",
        official=("vlmevalkit-e8e78f0", "lmms-eval-0.7.3", "lmms-eval-0.7.3-cli", "lmms-eval-0.7.1"),
        tables=(r"videomme/[^/]*\.parquet", r"[^/]*test[^/]*\.parquet", r"[^/]*\.parquet"),
        layouts=(
            ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question", "options",
             "answer"),
        ), rows=2700,
    ),
)  # fmt: skip
