"""Official scorers of LongVideoBench, and how lmms-eval puts subtitle lines between frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keye.scoring.official.matching import RANDOM, find_first_letter, list_letters
from keye.scoring.official.multiple_choice import KIT, LMMS, Items, score_first_letter
from keye.scoring.official.registry import Document, Fields, register

_PHRASES: Final = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
_FRAME: Final = "<image>"


@register("longvideobench", "item", LMMS)
def score_item(document: Document, prediction: str) -> Fields:
    """The first capital of A to E, however many options there are; else an option by chance, which is wrong here."""
    letter = find_first_letter(prediction, "ABCDE", _PHRASES)
    return {
        "extracted": letter or RANDOM,
        "score": int(letter == list_letters(26)[document["correct_choice"]]),
        "random": not letter,
    }


@register("longvideobench", "item", KIT)
def score_kit_item(document: Document, prediction: str) -> Fields:
    """The first capital of A to E, else VLMEvalKit's shared rule over the texts of the options."""
    options = [option.strip(". \n") for option in document["options"]]
    letters = list_letters(len(options))
    texts = dict(zip(letters, options, strict=True))
    return score_first_letter(prediction, "ABCDE", texts, letters[document["correct_choice"]])


@register("longvideobench", "aggregate", LMMS)
def average_items(document: Document, items: Items) -> Fields:
    """Accuracy to five digits; each question counts in its duration group and in its category."""
    subsets = defaultdict(list)
    for item, prediction in items:
        for name in (item["duration_group"], item["question_category"]):
            subsets[name].append(score_item(item, prediction)["score"])
    overall = average_subsets(list(subsets.values()))
    return {"metrics": {"overall": overall}, "note": "random picks counted wrong"}


def average_subsets(subsets: Sequence[Sequence[int]]) -> float:
    """Accuracy from those of the subsets, weighted by their size and rounded to five digits, as MMMU's code has it."""
    total = sum(len(scores) for scores in subsets)
    weighted = 0.0
    for scores in subsets:
        weighted += sum(scores) / len(scores) * len(scores)
    return round(weighted / total, 5) if total else 0


@register("longvideobench", "subtitles", LMMS)
def place_subtitles(document: Document, prediction: None) -> Fields:
    """Times of the frames in s, and frames and subtitle lines in the order in which the model reads them."""
    duration, count = document["duration"], document["max_num_frames"]
    step, total = (duration / count, count) if duration > count else (1, int(duration))
    frames = [step * index for index in range(total)]
    lines: list[str] = []
    done = 0
    for subtitle in document["subtitles"]:
        start, end, text = _read_subtitle(subtitle, document["starting_timestamp_for_subtitles"], duration)
        middle = (start + end) / 2
        while done < len(frames) and frames[done] <= middle:
            lines.append(_FRAME)
            done += 1
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        # Only a line that a frame falls into is shown.
        if any(start < frame < end for frame in frames):
            lines.append(text)
    lines += [_FRAME] * (len(frames) - done)
    return {"frame_timestamps": frames, "interleaved": "\n".join(lines).split("\n")}


def _read_subtitle(subtitle: Mapping[str, Any], offset: float, duration: float) -> tuple[float, float, str]:
    """Start and end in s of the clip, and the line. Where its end is not a decimal number, the video's counts."""
    if "timestamp" in subtitle:
        start, end = subtitle["timestamp"]
        return start - offset, (end if isinstance(end, float) else duration) - offset, subtitle["text"]
    return _read_clock(subtitle["start"]) - offset, _read_clock(subtitle["end"]) - offset, subtitle["line"]


def _read_clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
