"""Multiple-choice questions about one picture: MMStar, AI2D, RealWorldQA, MMBench."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from keye.evals.choices import ChoiceTask, ask_letter, letter_of, read_columns, read_options, split_options
from keye.evals.data.files import DataFolder
from keye.evals.tables import image_part, text_part
from keye.evals.task import STRICT, EvalItem, ItemScore, ScoredItem, Summary, TaskSettings, mean_over, split_gold
from keye.evals.tasks.subjects import SHORT, score_open
from keye.scoring.official.registry import Document

KIT: Final = "vlmevalkit-e8e78f0"
LMMS: Final = ("lmms-eval-0.7.3", "lmms-eval-0.7.3-cli")
#: Indices of MMBench's rows with rotated options differ by this from those of their question.
_ROTATION: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ImageChoice(ChoiceTask):
    """Options in columns A, B, ..., in a list, or inside the question; a question without any is open. `labels_of`
    names columns that become parts of the report."""

    labels_of: tuple[str, ...] = ()

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        question, options = str(row["question"]), read_columns(row)
        if not options and row.get("options") not in (None, ""):
            options = read_options(row["options"])
        if not options:
            question, options = split_options(question)
        hint = row.get("hint")
        if hint and str(hint) != "nan":
            question = f"{hint}\n{question}"
        name = str(row.get("index", row.get("question_id", row["_row"])))
        answer = str("" if row.get("answer") is None else row["answer"]).strip()
        document = {
            **{label: row.get(label) for label in ("category", "l2_category")}, "options": options, "index": name,
            "question": row["question"], "answer": letter_of(answer, options) if options else answer,
        }  # fmt: skip
        prompt = ask_letter(question, options, reasoning=settings.reasoning) if options else f"{question}\n{SHORT}"
        labels = {label.replace("_", " "): str(row[label]) for label in self.labels_of if row.get(label) is not None}
        picture = folder.picture(row["image"])
        yield EvalItem(
            name, picture.rpartition("/")[2] or name, (image_part(picture), text_part(prompt)), document, labels,
            has_gold=bool(document["answer"]),
        )  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By letter; an open question by its short answer."""
        if document["options"]:
            return super().score(document, prediction)
        return score_open(prediction, [document["answer"]])


@dataclass(frozen=True, kw_only=True)
class AI2D(ImageChoice):
    """lmms-eval's AI2D has no item score: what it extracts is compared with the letter."""

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """`filtered` is the letter."""
        if "filtered" in fields and "score" not in fields:
            extracted = fields["filtered"]
            return ItemScore(float(str(extracted).strip() == document["answer"]), extracted)
        return super().read_fields(fields, document)


@dataclass(frozen=True, kw_only=True)
class MMStar(ImageChoice):
    """The headline is the mean over the sub-categories, as in lmms-eval; accuracy over questions stands beside."""

    metric: str = "mean over sub-categories"

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """Sub-categories without questions do not count."""
        summary = super().summarise(scored, scorer)
        counted, _ = split_gold(scored)
        overall = {} if summary.value is None else {"questions": {"all": summary.value}}
        return replace(summary, value=mean_over(counted, "l2 category"), parts={**summary.parts, **overall})


@dataclass(frozen=True, kw_only=True)
class MMBench(ImageChoice):
    """Questions that come again with rotated options: right only if all of its rows are right. The headline is that of
    questions; accuracy over rows stands beside. Rows that are absent do not count against a question."""

    metric: str = "circular accuracy"

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """Rows are of one question where their indices differ by millions."""
        summary = super().summarise(scored, scorer)
        counted, _ = split_gold(scored)
        questions: dict[str, float] = defaultdict(lambda: 1.0)
        for entry in counted:
            index = entry.item.document["index"]
            key = str(int(index) % _ROTATION) if index.isdecimal() else index
            questions[key] = min(questions[key], entry.score)
        if not questions:
            return summary
        value = 100 * sum(questions.values()) / len(questions)
        return replace(summary, value=value, parts={**summary.parts, "rows": {"all": summary.value or 0.0}})


_DATA: Final = (r"[^/]*(?:test|val|dev)[^/]*\.parquet", r"[^/]*\.parquet", r"[^/]*\.tsv")
TASKS = (
    MMStar(
        name="mmstar", title="MMStar", measures="questions that cannot be answered without their picture",
        source="Lin-Chen/MMStar", licence="not stated where we looked", media="image", dimension="General VQA",
        official=(*LMMS, KIT), tables=(r"mmstar\.parquet", *_DATA), rows=1500, labels_of=("category", "l2_category"),
        layouts=(("index", "question", "image", "answer", "category", "l2_category"),),
    ),
    AI2D(
        name="ai2d", title="AI2D (test)", measures="diagrams of school science", source="lmms-lab-encoder/ai2d",
        licence="not stated where we looked", media="image", dimension="General VQA", official=(KIT, *LMMS),
        tables=_DATA, rows=3088,
        layouts=(("question", "image", "options", "answer"), ("index", "question", "image", "answer", "A", "B")),
    ),
    ImageChoice(
        name="realworldqa", title="RealWorldQA", measures="space and everyday scenes in photographs",
        source="lmms-lab-encoder/RealWorldQA", licence="CC-BY-ND 4.0", media="image", dimension="General VQA",
        official=(KIT, *LMMS), tables=_DATA, rows=765, layouts=(("question", "image", "answer"),),
    ),
    MMBench(
        name="mmbench", title="MMBench (English, dev)", measures="perception and reasoning in twenty abilities",
        source="lmms-lab-encoder/MMBench", licence="Apache-2.0", media="image", dimension="General VQA", official=(),
        tables=(r"MMBench_DEV_EN[^/]*\.tsv", r"en/dev[^/]*\.parquet", r"[^/]*dev[^/]*\.parquet"), rows=4329,
        layouts=(("index", "question", "image", "answer", "A", "B", "category"),),
        labels_of=("category", "L2-category"),
    ),
)  # fmt: skip
