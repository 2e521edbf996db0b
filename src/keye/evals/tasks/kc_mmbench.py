"""KC-MMBench: six tasks of short-video operations in Chinese. Frames are given as pictures.

Strict scores need no judge: yes and no in either language, lists of them in order, and equal texts; where the authors
ask a judge about a free answer and the texts differ, the item scores 0 and says that a judge is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from keye.evals.data.files import DataFolder, parse_list
from keye.evals.tables import TableTask, image_part, text_part
from keye.evals.task import EvalItem, ItemScore, TaskSettings
from keye.scoring.official.registry import Document
from keye.scoring.strict.reasoning import strip_reasoning
from keye.scoring.strict.text import find_answer_text, match_text
from keye.scoring.strict.yes_no import find_yes_no, read_yes_no

YES, NO = "是", "否"
#: What stands between the words of a list, and around them.
_SEPARATORS: Final = re.compile(r"[,\uff0c\u3001;\uff1b_\s/]+")
_MARKS: Final = " '\".\u3002\u2018\u2019\u201c\u201d"
_YES_OR_NO: Final = "请只回答“是”或“否”。"


@dataclass(frozen=True, kw_only=True)
class KCMMBench(TableTask):
    """One of the six. `form` is that of the answer: yes or no, a list of them, or free text."""

    form: Literal["yes_no", "list", "text"]

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row with its frames."""
        value = row.get("image_path") or row.get("image")
        is_list = isinstance(value, list) or str(value).lstrip().startswith("[")
        paths = parse_list(value, "image_path") if is_list else [value]
        pictures = [image_part(folder.picture(path)) for path in paths]
        question = f"{row['question']}\n{_YES_OR_NO}" if self.form == "yes_no" else str(row["question"])
        answer = str(row.get("answer") if row.get("answer") is not None else "").strip()
        yield EvalItem(
            str(row["index"]), str(paths[0])[:200], (*pictures, text_part(question)),
            {"answer": answer, "question": row["question"]}, {}, has_gold=bool(answer),
        )  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By the form of the answer."""
        if self.form == "yes_no":
            answer = find_yes_no(prediction)
            word = None if answer is None else YES if answer else NO
            return ItemScore(float(word is not None and word == _yes_no_of(document["answer"])), word)
        if self.form == "list":
            words = _read_list(strip_reasoning(prediction).conclusion)
            golds = [_yes_no_of(word) for word in document["answer"].split("_")]
            return ItemScore(float(words is not None and words == golds), "_".join(words) if words else None)
        if match_text(prediction, [document["answer"]]):
            return ItemScore(1.0, find_answer_text(prediction))
        return ItemScore(0.0, judge_needed=True)


def _yes_no_of(text: str) -> str:
    answer = read_yes_no(text)
    return text.strip() if answer is None else YES if answer else NO


def _read_list(text: str) -> list[str] | None:
    """The words of the last list in brackets, or of a reply that is nothing but a list; None unless all of them are yes
    or no."""
    lists = re.findall(r"[\[【]([^\[\]【】]{0,2000})[\]】]", text)
    body = lists[-1] if lists else text[:2000]
    answers = [read_yes_no(word) for word in _SEPARATORS.split(body) if word.strip(_MARKS)]
    if not answers or None in answers:
        return None
    return [YES if answer else NO for answer in answers]


def _task(
    suffix: str, table: str, form: Literal["yes_no", "list", "text"], measures: str, official: tuple[str, ...] = ()
) -> KCMMBench:
    return KCMMBench(
        name=f"kcmmbench_{suffix}", title=f"KC-MMBench {table}", measures=measures, source="Kwai-Keye/KC-MMbench",
        licence="no statement found", media="image", dimension="Video", scored_as="kcmmbench", form=form,
        kind="yes_no" if form == "yes_no" else "item", official=official,
        tables=(rf"subsets/{table}\.tsv", rf"{table}\.tsv"),
        layouts=(("index", "question", "answer", "image_path"), ("index", "question", "answer", "image")),
    )  # fmt: skip


_KEYE: Final = ("keye-e472844",)
TASKS = (
    _task("cpv", "CPV", "text", "attributes of products in videos"),
    _task("video_topic", "Video_Topic", "list", "which videos belong to a topic"),
    _task("video_order", "Video_Order", "text", "the order of videos of a collection"),
    _task("porn_comment", "PornComment", "yes_no", "whether a comment is pornographic", _KEYE),
    _task("high_like", "High_like", "yes_no", "whether a comment would be liked by many", _KEYE),
    _task("spu", "SPU", "yes_no", "whether two videos show the same product", _KEYE),
)
