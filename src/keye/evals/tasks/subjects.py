"""Questions of school and university subjects, with options or open: MMMU, Video-MMMU, MMVU.

Strict scores: the letter, or the short answer of the reply equal to a gold answer as text, number or expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keye.evals.choices import LETTERS, ChoiceTask, ask_letter, gold_letter, list_options, read_options
from keye.evals.data.files import DataFolder, parse_list
from keye.evals.tables import image_part, text_part, video_part
from keye.evals.task import EvalItem, ItemScore, TaskSettings
from keye.scoring.official.registry import Document
from keye.scoring.strict.text import find_answer_text, match_formula, match_text

LMMS: Final = ("lmms-eval-0.7.3", "lmms-eval-0.7.3-cli")
SHORT: Final = "Answer with a single word, number or short phrase."
REASON: Final = "Think step by step, then end with 'Final Answer: <answer>'."
_PLACE: Final = re.compile(r"<image (\d)>")
#: Subjects of Video-MMMU and MMMU by discipline.
_DISCIPLINES: Final = {
    "Art and design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
}
_DISCIPLINE_OF: Final = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects.split()}


@dataclass(frozen=True, kw_only=True)
class OpenOrChoice(ChoiceTask):
    """Questions whose `question_type` says whether they have options."""

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By letter, or by the short answer."""
        if document["question_type"] == "multiple-choice":
            return super().score(document, prediction)
        return score_open(prediction, gold_answers(document["answer"]))


def score_open(prediction: str, golds: Sequence[str]) -> ItemScore:
    """1 where the short answer equals a gold one as text, number or expression; never for an empty gold answer."""
    is_right = match_text(prediction, golds) or match_formula(prediction, golds)
    return ItemScore(float(is_right), find_answer_text(prediction))


def gold_answers(answer: object) -> list[str]:
    """The gold answers of an open question: one, or a list, also written as text."""
    if isinstance(answer, str) and not re.match(r"\s*\[\s*['\"]", answer):
        return [answer]
    return [str(value) for value in parse_list(answer, "answer")] if isinstance(answer, str | list) else [str(answer)]


def _subject_of(name: str) -> str:
    """The subject in an id such as `validation_Art_Theory_3`."""
    return "_".join(name.split("_")[1:-1])


@dataclass(frozen=True, kw_only=True)
class MMMU(OpenOrChoice):
    """Pictures stand in the text where it names them (`<image 1>`)."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        name, kind = str(row["id"]), row["question_type"]
        options = [str(option) for option in parse_list(row["options"], "options")]
        subject = _subject_of(name)
        document = {"question_type": kind, "subject": subject, "options": options, "answer": row.get("answer")}
        if kind == "multiple-choice":
            prompt = ask_letter(row["question"], options, reasoning=settings.reasoning)
        else:
            prompt = f"{row['question']}\n{REASON if settings.reasoning else SHORT}"
        labels = {"subject": subject, "discipline": _DISCIPLINE_OF.get(subject, "other"), "question type": kind}
        yield EvalItem(
            name, name, tuple(_with_pictures(prompt, row, folder)), document, labels,
            has_gold=_has_gold(document),
        )  # fmt: skip


def _with_pictures(prompt: str, row: Mapping[str, Any], folder: DataFolder) -> Iterable[dict[str, Any]]:
    place = 0
    for match in _PLACE.finditer(prompt):
        if text := prompt[place : match.start()].strip():
            yield text_part(text)
        yield image_part(folder.picture(row.get(f"image_{match[1]}")))
        place = match.end()
    yield text_part(prompt[place:].strip())


def _has_gold(document: Mapping[str, Any]) -> bool:
    """Whether there is an answer: a letter of an option, or a text."""
    if document["question_type"] == "multiple-choice":
        letter = gold_letter(document)
        return letter is not None and letter in LETTERS[: len(read_options(document["options"]))]
    return any(gold.strip(" ?") for gold in gold_answers(document.get("answer") or ""))


@dataclass(frozen=True, kw_only=True)
class VideoMMMU(OpenOrChoice):
    """Lectures. On the adaptation track the question's picture is the last frame; on the others it is to be ignored."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        name, kind = str(row["id"]), row["question_type"]
        options = [str(option) for option in parse_list(row["options"], "options")] if kind == "multiple-choice" else []
        subject = _subject_of(name)
        document = {"question_type": kind, "subject": subject, "options": options, "answer": row.get("answer")}
        place = f"{row['_place']} {self.name}".lower()
        track = next((track for track in _TRACKS if track in place), "unknown")
        plain = read_options(options)
        question = f"{row['question']}\n{list_options(plain)}" if plain else str(row["question"])
        if track not in ("perception", "comprehension"):
            before = "Learn from the video, then answer; the picture of the question is the last frame of the video.\n"
            prompt = f"{before}{question}"
        else:
            prompt = f"{question}\nDisregard the quiz in the last frame of the video."
        labels = {"track": track, "subject": subject, "discipline": _DISCIPLINE_OF.get(subject, "other")}
        yield EvalItem(
            f"{track}/{name}", name, (video_part(folder.locate(f"{name}.mp4")), text_part(prompt)), document, labels,
            has_gold=_has_gold(document),
        )  # fmt: skip


#: Tracks, which are named in the paths of their tables.
_TRACKS: Final = ("perception", "comprehension", "adaptation")

_MMVU_GROUPS: Final = {
    "Science": "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science Neurobiology Electromagnetism "
    "Thermodynamics Mechanics",
    "Engineering": "Civil_Engineering Electrical_Engineering Mechanical_Engineering Biomedical_Engineering "
    "Electronics_and_Communication Computer_Science",
    "Healthcare": "Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy Dentistry",
    "Humanities": "Art Literature History Law Economics Management",
}
_MMVU_GROUP_OF: Final = {name: group for group, names in _MMVU_GROUPS.items() for name in names.split()}


@dataclass(frozen=True, kw_only=True)
class MMVU(OpenOrChoice):
    """Videos of 27 expert subjects, which are the folders of the videos."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        path, kind = str(row["video_path"]), row["question_type"]
        parents = path.split("?")[0].split("/")
        category = parents[-2] if len(parents) > 1 else "unknown"
        document = {
            "question_type": kind,
            "category": category,
            "answer": row.get("answer"),
            "question": row["question"],
        }
        if kind == "multiple-choice":
            document["options"] = read_options(row["choices"])
            document["choices"] = dict(zip(LETTERS, document["options"], strict=False))
            prompt = ask_letter(row["question"], document["options"], reasoning=settings.reasoning)
        else:
            prompt = f"{row['question']}\n{REASON if settings.reasoning else SHORT}"
        labels = {"subject": category, "group": _MMVU_GROUP_OF.get(category, "other"), "question type": kind}
        name = "/".join(parents[-2:])
        yield EvalItem(
            str(row["id"]), name, (video_part(folder.locate(name, within="videos")), text_part(prompt)), document,
            labels, has_gold=_has_gold(document),
        )  # fmt: skip


def _videommmu(suffix: str, title: str, tables: str, rows: int) -> VideoMMMU:
    return VideoMMMU(
        name=f"videommmu{suffix}", title=title, measures="learning from lectures of six disciplines",
        source="lmms-eval/VideoMMMU", licence="not stated where we looked", media="video", dimension="Video",
        scored_as="videommmu", official=LMMS, rows=rows, max_tokens=4096,
        tables=(rf"(?:{tables})/[^/]*\.parquet", rf"[^/]*(?:{tables})[^/]*\.(?:parquet|jsonl?)"),
        layouts=(("id", "question", "options", "answer", "question_type"),),
    )  # fmt: skip


TASKS = (
    MMMU(
        name="mmmu", title="MMMU (validation)", measures="college questions of 30 subjects with pictures",
        source="MMMU/MMMU", licence="Apache-2.0", media="image", dimension="STEM", rows=900, max_tokens=4096,
        official=("vlmevalkit-e8e78f0", *LMMS, "lmms-eval-75571cf"), tables=(r"[^/]*validation[^/]*\.parquet",),
        layouts=(("id", "question", "options", "answer", "question_type", "image_1"),),
    ),
    _videommmu("", "Video-MMMU", "Perception|Comprehension|Adaptation", 900),
    _videommmu("_perception", "Video-MMMU perception", "Perception", 300),
    _videommmu("_comprehension", "Video-MMMU comprehension", "Comprehension", 300),
    _videommmu("_adaptation", "Video-MMMU adaptation", "Adaptation", 300),
    MMVU(
        name="mmvu", title="MMVU (validation)", measures="expert questions about videos of 27 subjects",
        source="lmms-eval/MMVU", licence="not stated where we looked", media="video", dimension="Video", official=LMMS,
        tables=(r"[^/]*validation[^/]*\.(?:parquet|jsonl?)",), rows=1000, max_tokens=4096,
        layouts=(("id", "question", "question_type", "choices", "answer", "video_path"),),
    ),
)  # fmt: skip
