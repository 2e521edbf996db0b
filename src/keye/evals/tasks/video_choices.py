"""Multiple-choice questions about videos: Video-MME, LongVideoBench with and without subtitles, MLVU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keye.errors import KeyeError
from keye.evals.choices import ChoiceTask, ask_letter, gold_letter, letter_of, read_options, split_options
from keye.evals.data.files import DataFolder, NoFolder, parse_list
from keye.evals.tables import text_part, video_part
from keye.evals.task import STRICT, EvalItem, ScoredItem, Summary, TaskSettings, mean_over, split_gold
from keye.media.subtitles import read_subtitle_file
from keye.scoring.official.registry import find_scorer

LMMS = ("lmms-eval-0.7.3", "lmms-eval-0.7.3-cli")
KIT = "vlmevalkit-e8e78f0"


@dataclass(frozen=True, kw_only=True)
class VideoMME(ChoiceTask):
    """Four options; subtitles, where wanted, stand before the question as one text."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        names = ("videoID", "duration", "domain", "sub_category", "task_type", "answer", "question")
        options = row["candidates"] if "options" not in row else row["options"]
        document = {name: row[name] for name in names} | {
            "options": [str(option) for option in parse_list(options, "options")]
        }
        prompt = ask_letter(row["question"], read_options(document["options"]), reasoning=settings.reasoning)
        if settings.subtitles:
            prompt = f"{_subtitles(folder, row['videoID'])}{prompt}"
        labels = {"duration": row["duration"], "domain": row["domain"], "task type": row["task_type"]}
        yield EvalItem(
            str(row["question_id"]), str(row["videoID"]),
            (video_part(folder.locate(f"{row['videoID']}.mp4", within="data")), text_part(prompt)), document, labels,
            has_gold=gold_letter(document) is not None,
        )  # fmt: skip


def _subtitles(folder: DataFolder, video: str) -> str:
    """The subtitles of a video as one text; nothing where it has none, as the benchmark has it."""
    path = Path(folder.locate(f"{video}.srt", (".srt",), within="subtitle"))
    if not path.is_file():
        return ""
    lines = "\n".join(line.text for line in read_subtitle_file(path).lines)
    return f"Subtitles of the video:\n{lines}\n\n"


@dataclass(frozen=True, kw_only=True)
class LongVideoBench(ChoiceTask):
    """Two to five options. With `interleaved` frames and subtitle lines follow one another by time: a line is shown
    where a frame falls into it, as the authors place them; frames between two lines are one part of the video."""

    interleaved: bool = False

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row; options are a list, or columns option0, option1 ... that end with N/A."""
        if "candidates" in row:
            options = [str(option) for option in parse_list(row["candidates"], "candidates")]
        else:
            columns = [str(row.get(f"option{number}", "N/A")) for number in range(5)]
            options = columns[: columns.index("N/A")] if "N/A" in columns else columns
        number = str(row.get("correct_choice"))
        document: dict[str, Any] = {
            "options": options, "correct_choice": int(number) if number.isdecimal() else -1,
            "duration_group": row["duration_group"], "question_category": row["question_category"],
            **{f"option{place}": option for place, option in enumerate([*options, *["N/A"] * 5][:5])},
        }  # fmt: skip
        video = folder.locate(row["video_path"], within="videos")
        media = self._interleave(row, video, folder, settings) if self.interleaved else [video_part(video)]
        prompt = ask_letter(row["question"], options, reasoning=settings.reasoning)
        labels = {"duration group": f"{row['duration_group']} s", "category": str(row["question_category"])}
        yield EvalItem(
            str(row.get("id", row["_row"])), str(row.get("video_id", row["video_path"])), (*media, text_part(prompt)),
            document, labels, has_gold=0 <= document["correct_choice"] < len(options),
        )  # fmt: skip

    def _interleave(
        self, row: Mapping[str, Any], video: str, folder: DataFolder, settings: TaskSettings
    ) -> list[dict[str, Any]]:
        if isinstance(folder, NoFolder):
            return [video_part(video)]
        path = Path(folder.locate(row["subtitle_path"], (".json",), within="subtitles"))
        try:
            lines = json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise KeyeError(f"{path} is missing or not JSON; add the subtitles of {self.title}") from None
        duration = float(row["duration"])
        placed = find_scorer("longvideobench", "subtitles", LMMS[0])(
            {
                "duration": duration, "max_num_frames": settings.frames, "subtitles": lines,
                "starting_timestamp_for_subtitles": float(row.get("starting_timestamp_for_subtitles") or 0),
            },
            None,
        )  # fmt: skip
        return _join_frames(video, placed["frame_timestamps"], placed["interleaved"], duration)


def _join_frames(video: str, times: Sequence[float], order: Sequence[str], duration: float) -> list[dict[str, Any]]:
    """Parts of a message: frames that follow one another are a stretch of the video with as many frames."""
    step = times[1] - times[0] if len(times) > 1 else duration
    parts: list[dict[str, Any]] = []
    run: list[float] = []
    left = list(times)
    for entry in (*order, None):
        if entry == "<image>":
            run.append(left.pop(0))
            continue
        if run:
            end = min(duration, run[-1] + step)
            parts.append(video_part(video, video_start=round(run[0], 3), video_end=round(end, 3), nframes=len(run)))
            run = []
        if entry:
            parts.append(text_part(entry))
    return parts


@dataclass(frozen=True, kw_only=True)
class MLVU(ChoiceTask):
    """Options inside the question (the copies of lmms-eval) or as a list with the text of the answer (the authors'
    JSON). The headline is the mean over kinds of task, those that were asked, each counting the same."""

    split: str
    metric: str = "mean over task types"

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        kind, video = str(row.get("task_type", row.get("question_type"))), str(row.get("video_name", row.get("video")))
        if row.get("candidates") not in (None, ""):
            question, options = row["question"], read_options(row["candidates"])
        else:
            question, options = split_options(row["question"])
        if not options:
            raise KeyeError("the question has no options; open tasks of MLVU need a judge and are not read")
        document = {
            "split": self.split, "task_type": kind, "options": options, "question": row["question"],
            "answer": letter_of(row.get("answer"), options),
        }  # fmt: skip
        yield EvalItem(
            str(row.get("question_id") or row["_row"]), video,
            (video_part(folder.locate(video)), text_part(ask_letter(question, options, reasoning=settings.reasoning))),
            document, {"task type": kind}, has_gold=bool(document["answer"]),
        )  # fmt: skip

    def official_input(self, scored: Sequence[ScoredItem]) -> dict[str, Any]:
        """Theirs go by the split."""
        return {"split": self.split, **super().official_input(scored)}

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """The mean over task types; the mean over questions stands in the parts."""
        summary = super().summarise(scored, scorer)
        counted, _ = split_gold(scored)
        overall = {} if summary.value is None else {"questions": {"all": summary.value}}
        return replace(summary, value=mean_over(counted, "task type"), parts={**summary.parts, **overall})


def _longvideobench(suffix: str, title: str, *, interleaved: bool) -> LongVideoBench:
    return LongVideoBench(
        name=f"longvideobench_{suffix}", title=title, measures="questions that refer to moments, videos to an hour",
        source="longvideobench/LongVideoBench", licence="CC-BY-NC-SA 4.0", gate="terms to accept on the hub",
        media="video", dimension="Video", scored_as="longvideobench", official=(*LMMS, KIT),
        tables=(r"lvb_val\.json", r"[^/]*val[^/]*\.parquet"), interleaved=interleaved, rows=1337,
        layouts=(
            ("question", "candidates", "video_path", "duration_group", "question_category"),
            ("question", "option0", "video_path", "duration_group", "question_category"),
        ), published_as="longvideobench",
    )  # fmt: skip


def _mlvu(split: str, source: str, rows: int, tables: tuple[str, ...]) -> MLVU:
    return MLVU(
        name=f"mlvu_{split}", title=f"MLVU {split}", measures="long videos: plot, order, counting, needle, anomalies",
        source=source, licence="CC-BY-NC-SA 4.0", gate="terms to accept on the hub", media="video", dimension="Video",
        scored_as="mlvu", official=(*LMMS, "lmms-eval-0.7.1", KIT), split=split, tables=tables, rows=rows,
        layouts=(
            ("video_name", "question", "answer", "task_type"), ("video", "question", "candidates", "question_type"),
        ),
        published_as="mlvu",
    )  # fmt: skip


TASKS = (
    VideoMME(
        name="videomme", title="Video-MME", measures="understanding of videos of seconds to an hour",
        source="lmms-eval/Video-MME", licence="research only", media="video", dimension="Video",
        official=(KIT, *LMMS, "lmms-eval-0.7.1"), rows=2700,
        tables=(r"videomme/[^/]*\.parquet", r"[^/]*test[^/]*\.parquet", r"Video-MME\.tsv"),
        layouts=(
            ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question", "options",
             "answer"),
            ("videoID", "question_id", "duration", "domain", "sub_category", "task_type", "question", "candidates",
             "answer"),
        ),
    ),
    _longvideobench("v", "LongVideoBench (video alone)", interleaved=False),
    _longvideobench("i", "LongVideoBench (frames and subtitles interleaved)", interleaved=True),
    _mlvu("dev", "sy1998/MLVU_dev", 2174, (r"MLVU/json/[1-7]_[^/]*\.json", r"(?:json/)?[1-7]_[^/]*\.json",
                                           r"[^/]*(?:test|dev)[^/]*\.parquet")),
    _mlvu("test", "sy1998/MLVU_Test", 502, (r"[^/]*test[^/]*\.(?:parquet|jsonl?)",)),
)  # fmt: skip
