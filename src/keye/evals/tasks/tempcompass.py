"""TempCompass: does a model see speed, direction, order and change? Four ways of asking about the same videos."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from keye.evals.choices import LETTERS, split_options
from keye.evals.data.files import DataFolder
from keye.evals.tables import TableTask, text_part, video_part
from keye.evals.task import EvalItem, ItemScore, TaskSettings
from keye.scoring.official.registry import Document
from keye.scoring.strict.letters import find_letter
from keye.scoring.strict.reasoning import strip_reasoning
from keye.scoring.strict.yes_no import find_yes_no

_LINE: Final = re.compile(r"^\s*((?:Sentence|Caption|Option)\s+(\w+))\s*[:.]\s*(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
_FORMS: Final = {
    "multi-choice": "Answer with the letter of the best option only.", "yes_no": "Answer yes or no.",
    "caption_matching": "Answer with the name of the best option only.", "captioning": "",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TempCompass(TableTask):
    """One of the four ways; `kind` names it. A caption is right where a judge would pick the right option from it: no
    rule decides that, so captions score 0 and say that a judge is needed."""

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        video, dim = str(row["video_id"]), str(row.get("dim") or "unknown")
        names = ("question", "answer", "dim", "mc_question", "mc_answer")
        document = {name: row[name] for name in names if row.get(name) is not None}
        prompt = f"{row['question']}\n{_FORMS[self.kind]}".rstrip()
        yield EvalItem(
            str(row["_row"]), video, (video_part(folder.locate(f"{video}.mp4", within="videos")), text_part(prompt)),
            document, {"dimension": dim}, has_gold=bool(str(row.get("answer") or row.get("mc_answer") or "").strip()),
        )  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By letter, yes or no, or the option's name or text."""
        if self.kind == "captioning":
            return ItemScore(0.0, judge_needed=True)
        if self.kind == "yes_no":
            answer = find_yes_no(prediction)
            word = None if answer is None else "yes" if answer else "no"
            return ItemScore(float(word is not None and word == _plain(document["answer"])), word)
        if self.kind == "multi-choice":
            letter = find_letter(prediction, split_options(document["question"])[1])
            return ItemScore(float(letter is not None and letter == document["answer"].strip()[:1].upper()), letter)
        return _score_matching(document, prediction)

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """Their scorers do not say what they extracted."""
        score = super().read_fields(fields, document)
        return replace(score, extracted=None if score.judge_needed else fields.get("score"))


def _score_matching(document: Document, prediction: str) -> ItemScore:
    """The option whose name, letter or text the reply says."""
    options = _LINE.findall(document["question"])
    texts = [text for _, _, text in options] or split_options(document["question"])[1]
    names = [_plain(name) for name, _, _ in options]
    marks = [mark.upper() for _, mark, _ in options]
    answer = strip_reasoning(prediction).conclusion
    named = {names.index(_plain(match)) for match in re.findall(r"(?:Sentence|Caption|Option)\s+\w+", answer, re.I)
            if _plain(match) in names}  # fmt: skip
    if len(named) != 1:
        if answer.strip(" .()*").upper() in marks:
            named = {marks.index(answer.strip(" .()*").upper())}
        else:
            letter = find_letter(prediction, texts)
            named = set() if letter is None else {LETTERS.index(letter)}
    gold = _plain(_LINE.sub(r"\3", document["answer"]))
    if len(named) != 1:
        return ItemScore(0.0)
    chosen = texts[named.pop()]
    return ItemScore(float(_plain(chosen) == gold or _plain(chosen) == _plain(document["answer"])), chosen)


def _plain(text: str) -> str:
    return " ".join(str(text).lower().split()).strip(" .")


def _part(suffix: str, kind: str, title: str, rows: int, official: tuple[str, ...]) -> TempCompass:
    return TempCompass(
        name=f"tempcompass_{suffix}", title=f"TempCompass {title}",
        measures="speed, direction, order and change of attributes in short videos", source="lmms-eval/TempCompass",
        licence="not stated where we looked", media="video", dimension="Video", scored_as="tempcompass", kind=kind,
        official=official, tables=(rf"{kind}/[^/]*\.parquet", rf"[^/]*{kind}[^/]*\.(?:parquet|jsonl?)"), rows=rows,
        layouts=(("video_id", "question", "mc_answer" if kind == "captioning" else "answer"),),
        metric="accuracy by judge" if kind == "captioning" else "accuracy",
    )  # fmt: skip


_BOTH: Final = ("vlmevalkit-e8e78f0", "lmms-eval-0.7.3", "lmms-eval-0.7.3-cli")
TASKS = (
    _part("multi_choice", "multi-choice", "multiple choice", 1580, _BOTH),
    _part("yes_no", "yes_no", "yes or no", 2453, _BOTH),
    _part("caption_matching", "caption_matching", "caption matching", 1503, _BOTH),
    _part("captioning", "captioning", "captioning", 2004, ()),
)
