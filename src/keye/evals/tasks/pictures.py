"""Short answers about one picture: OCRBench, ChartQA, CountBenchQA, HallusionBench."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from keye.errors import KeyeError
from keye.evals.data.files import DataFolder, parse_list
from keye.evals.tables import TableTask, image_part, text_part
from keye.evals.task import STRICT, EvalItem, ItemScore, ScoredItem, Summary, TaskSettings, split_gold
from keye.evals.tasks.subjects import SHORT
from keye.scoring.official.registry import Document
from keye.scoring.strict.numbers import find_number, parse_number
from keye.scoring.strict.text import contains_text, find_answer_text, match_formula, match_relaxed
from keye.scoring.strict.yes_no import find_yes_no

KIT: Final = "vlmevalkit-e8e78f0"
LMMS: Final = ("lmms-eval-0.7.3", "lmms-eval-0.7.3-cli")
_FORMULAS: Final = ("HME100k", "Handwritten Mathematical Expression Recognition")


def _golds(answer: object) -> list[str]:
    """Gold answers: one, a list, or a list written as text; empty ones are none."""
    if answer is None:
        return []
    values = answer if isinstance(answer, list) else [answer]
    if isinstance(answer, str) and answer.lstrip().startswith("["):
        with suppress(KeyeError):  # some answers of charts are texts in brackets
            values = parse_list(answer, "answer")
    return [str(value).strip() for value in values if str(value).strip()]


@dataclass(frozen=True, kw_only=True)
class ShortAnswer(TableTask):
    """One picture, one question, short gold answers. `form` asks for the answer; `labels_of` are parts of a report."""

    form: str = ""
    labels_of: tuple[str, ...] = ()
    max_tokens: int = 512

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        picture = folder.picture(row["image"])
        document = self.document_of(row)
        text = f"{str(row['question']).strip()}\n{self.form}".strip()
        labels = {label.replace("_", " "): str(row[label]) for label in self.labels_of if row.get(label) is not None}
        yield EvalItem(
            str(row.get("id", row["_row"])), picture.rpartition("/")[2] or str(row["_row"]),
            (image_part(picture), text_part(text)), document, labels,
            has_gold=any(_golds(document.get("answer", document.get("number")))),
        )  # fmt: skip

    def document_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that scorers read."""
        return {name: row[name] for name in ("question", "answer", "type") if name in row}

    def score(self, document: Document, prediction: str) -> ItemScore:
        """Relaxed equality, as charts are read: numbers within 5 %, all else equal."""
        is_right = any(match_relaxed(prediction, gold) for gold in _golds(document["answer"]))
        return ItemScore(float(is_right), find_answer_text(prediction))


@dataclass(frozen=True, kw_only=True)
class OCRBench(ShortAnswer):
    """A gold answer in the reply as whole words; formulas are compared as mathematics. Of 1,000 questions."""

    def document_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`answer` is a list."""
        names = ("question", "question_type", "dataset")
        return {**{name: row[name] for name in names}, "answer": _golds(row["answer"])}

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By the kind of question."""
        golds = _golds(document["answer"])
        is_formula = document["dataset"] in _FORMULAS or document["question_type"] in _FORMULAS
        is_right = contains_text(prediction, golds) or (is_formula and match_formula(prediction, golds))
        return ItemScore(float(is_right), find_answer_text(prediction))


@dataclass(frozen=True, kw_only=True)
class CountBench(ShortAnswer):
    """The number of things."""

    def document_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The gold `number`."""
        return {"question": row["question"], "number": row["number"]}

    def score(self, document: Document, prediction: str) -> ItemScore:
        """The number that the reply answers equals the gold one."""
        number = find_number(prediction)
        return ItemScore(float(number is not None and number == parse_number(str(document["number"]))), number)

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """lmms-eval has two tasks of these data; `countbench` is the one that reads number words."""
        return ItemScore(float(fields.get("countbench", 0)), fields.get("countbench"))


@dataclass(frozen=True, kw_only=True)
class HallusionBench(TableTask):
    """Yes or no about pictures that mislead. The headline is the mean of three accuracies: over questions (aAcc), over
    figures of which all questions are right (fAcc), over questions that are right for all figures (qAcc). Members of a
    figure or a question that are absent do not count against it; those that failed do."""

    metric: str = "mean of aAcc, fAcc and qAcc"
    kind: str = "extract"
    max_tokens: int = 512

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row; some have no picture."""
        names = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input", "gt_answer")
        document = {name: str(row.get(name, "")) for name in names} | {"question": row["question"]}
        if document["gt_answer"] not in ("0", "1"):
            document["gt_answer"] = ""
        value = row.get("image") or row.get("filename")
        parts = [] if value in (None, "", "None") else [image_part(folder.picture(value))]
        key = "_".join(document[name] for name in names[:5])
        yield EvalItem(
            key, "_".join(document[name] for name in names[:3]),
            (*parts, text_part(f"{row['question']}\nAnswer yes or no.")), document,
            {"category": document["category"], "subcategory": document["subcategory"]},
            has_gold=bool(document["gt_answer"]),
        )  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """Yes or no."""
        answer = find_yes_no(prediction)
        word = None if answer is None else "yes" if answer else "no"
        return ItemScore(float(answer is not None and answer == (document["gt_answer"] == "1")), word)

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """Theirs give the word or the digit."""
        extracted = fields.get("extracted")
        right = ("1", "Yes") if document["gt_answer"] == "1" else ("0", "No")
        return ItemScore(float(extracted in right), extracted)

    def official_input(self, scored: Sequence[ScoredItem]) -> dict[str, Any]:
        """Theirs read rows with their replies."""
        return {"records": [{**entry.item.document, "model_prediction": entry.prediction} for entry in scored]}

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """The three accuracies and their mean."""
        summary = super().summarise(scored, scorer)
        counted, _ = split_gold(scored)
        if summary.value is None:
            return summary
        shares = {"aAcc": summary.value}
        for name, member in (("fAcc", "figure_id"), ("qAcc", "question_id")):
            groups: dict[tuple[str, ...], float] = defaultdict(lambda: 1.0)
            for entry in counted:
                key = tuple(entry.item.document[part] for part in ("category", "subcategory", "set_id", member))
                groups[key] = min(groups[key], entry.score)
            shares[name] = 100 * sum(groups.values()) / len(groups)
        return replace(summary, value=sum(shares.values()) / 3, parts={"accuracies": shares, **summary.parts})


_DATA: Final = (r"[^/]*(?:test|image)[^/]*\.parquet", r"[^/]*\.(?:parquet|tsv|jsonl?)")
TASKS = (
    OCRBench(
        name="ocrbench", title="OCRBench", measures="reading text, documents and formulas in pictures", rows=1000,
        source="echo840/OCRBench", licence="not stated where we looked", media="image", dimension="General VQA",
        official=(KIT, *LMMS), tables=_DATA, metric="share of 1,000", labels_of=("question_type",),
        layouts=(("question", "answer", "dataset", "question_type", "image"),),
    ),
    ShortAnswer(
        name="chartqa", title="ChartQA (test)", measures="reading charts", source="lmms-lab-encoder/ChartQA",
        licence="GPL-3.0", media="image", dimension="General VQA", official=(KIT, *LMMS), tables=_DATA, rows=2500,
        metric="relaxed accuracy", layouts=(("question", "answer", "type", "image"),), labels_of=("type",), form=SHORT,
    ),
    CountBench(
        name="countbench", title="CountBenchQA", measures="counting", source="vikhyatk/CountBenchQA",
        licence="not stated where we looked", media="image", dimension="General VQA", official=LMMS, tables=_DATA,
        layouts=(("question", "number", "image"),), form="Answer with a single number.",
    ),
    HallusionBench(
        name="hallusionbench", title="HallusionBench", measures="answers that follow the picture, not habit", rows=951,
        source="lmms-lab-encoder/HallusionBench", licence="BSD-3", media="image", dimension="General VQA",
        official=(KIT, *LMMS), tables=(r"[^/]*image-[^/]*\.parquet", r"HallusionBench\.(?:json|tsv)", *_DATA),
        layouts=(("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer"),),
    ),
)  # fmt: skip
