"""Mathematics and logic over pictures: MathVista, MathVerse, MathVision, LogicVista, WeMath.

Strict scores are by rules: the letter, or the answer equal to the gold one as a number of the stated precision or as an
expression. What no rule can compare is wrong; the judged share of official scorers says how much of that they leave to
a judge.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from keye.evals.choices import LETTERS, ChoiceTask, gold_letter, letter_of, list_options, read_options, split_options
from keye.evals.data.files import DataFolder, parse_list
from keye.evals.tables import image_part, text_part
from keye.evals.task import STRICT, EvalItem, ItemScore, ScoredItem, Summary, TaskSettings, split_gold
from keye.evals.tasks.subjects import gold_answers, score_open
from keye.scoring.official.registry import Document
from keye.scoring.strict.numbers import find_number
from keye.scoring.strict.reasoning import strip_reasoning
from keye.scoring.strict.text import find_answer_text

KIT: Final = "vlmevalkit-e8e78f0"
_BOXED: Final = "Solve it step by step and put the answer in \\boxed{}."
_BOXED_LETTER: Final = "Solve it step by step and put the letter of the right option in \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Maths(ChoiceTask):
    """A question with options in the text or a list, or an open one. `labels_of` names columns of the report's parts,
    `key` that of the id."""

    key: str = "id"
    labels_of: tuple[str, ...] = ()
    max_tokens: int = 8192

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row; a version of MathVerse has no picture."""
        question, options = self.question_of(row)
        document = self.document_of(row, options)
        text = f"{question}\n{list_options(options)}\n{_BOXED_LETTER}" if options else f"{question}\n{_BOXED}"
        picture = row.get("decoded_image") or row.get("image") or row.get("image_path")
        path = "" if picture is None or str(picture).strip() == "" else folder.picture(picture)
        name = str(row.get(self.key, row["_row"]))
        parts = ([image_part(path)] if path else []) + [text_part(text)]
        labels = {label.replace("_", " "): str(row[label]) for label in self.labels_of if row.get(label) is not None}
        yield EvalItem(
            name, path.rpartition("/")[2] or name, tuple(parts), document, labels,
            has_gold=bool(str(document["answer"]).strip()),
        )  # fmt: skip

    def question_of(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The question and its options; of options that only repeat the letters, the letters."""
        value = row.get("options", row.get("choices", row.get("option")))
        if value is not None and str(value).strip() not in ("", "[]", "None"):
            return str(row["question"]), read_options(value)
        stem, options = split_options(str(row["question"]))
        return (stem, options) if options else (str(row["question"]), [])

    def document_of(self, row: Mapping[str, Any], options: list[str]) -> dict[str, Any]:
        """The fields that scorers read."""
        answer = row.get("answer")
        return {
            "question": row["question"], "options": options,
            "answer": letter_of(answer, options) if options else str("" if answer is None else answer),
        }  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By letter, or by the answer as a number or an expression."""
        if document["options"]:
            return super().score(document, prediction)
        return score_open(prediction, gold_answers(document["answer"]))


@dataclass(frozen=True, kw_only=True)
class MathVista(Maths):
    """Numbers of a stated precision, lists, texts and options."""

    key: str = "pid"

    def question_of(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The question, for open ones with the form of the answer, and the choices."""
        question = str(row["question"])
        if row["question_type"] == "multi_choice":
            return question, read_options(row["choices"])
        kind, places = row["answer_type"], int(float(row.get("precision") or 0))
        forms = {
            "integer": "an integer",
            "float": f"a number with {places} decimal places",
            "list": "a list such as [1, 2]",
        }
        return (f"{question}\nThe answer is {forms[kind]}." if kind in forms else question), []

    def document_of(self, row: Mapping[str, Any], options: list[str]) -> dict[str, Any]:
        """As the data have them; `answer_option` is the letter of the answer."""
        answer = str("" if row.get("answer") is None else row["answer"])
        is_choice = row["question_type"] == "multi_choice"
        return {
            **{name: row.get(name) for name in ("question", "question_type", "answer_type", "precision")},
            "options": options if is_choice else [], "choices": options if is_choice else None, "answer": answer,
            "answer_option": letter_of(answer, options) if is_choice else None,
        }  # fmt: skip

    def score(self, document: Document, prediction: str) -> ItemScore:
        """Numbers are rounded to the precision of the gold one."""
        if document["question_type"] == "multi_choice":
            options = document.get("options") or document["choices"]
            return super().score({**document, "options": options, "answer": document["answer_option"]}, prediction)
        kind, gold = document["answer_type"], document["answer"]
        if kind in ("integer", "float"):
            number = find_number(prediction)
            places = 0 if kind == "integer" else int(float(document.get("precision") or 0))
            is_right = number is not None and round(number, places) == round(float(gold), places)
            return ItemScore(float(is_right and (kind == "float" or number == round(float(gold)))), number)
        if kind == "list":
            return _score_list(prediction, gold)
        return score_open(prediction, [gold])

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """lmms-eval: the default extraction, which leaves most replies to a judge. VLMEvalKit: what its rules take
        without one."""
        if "default" in fields:
            return super().read_fields(fields["default"], document)
        if "prefetch" in fields:
            if fields["prefetch"] is False:
                return ItemScore(0.0, judge_needed=True)
            return ItemScore(float(fields["score_if_judge_echoes"]), fields["prefetch"])
        return super().read_fields(fields, document)


def _score_list(prediction: str, gold: str) -> ItemScore:
    """Lists of numbers are equal in order."""
    lists = re.findall(r"\[[^\[\]]{0,500}\]", strip_reasoning(prediction).conclusion)
    if not lists:
        return ItemScore(0.0)
    try:
        numbers = [float(value) for value in parse_list(lists[-1], "list")]
        golds = [float(value) for value in parse_list(gold, "answer")]
    except (ValueError, TypeError):  # of what is not a list of numbers
        return ItemScore(0.0)
    return ItemScore(float(numbers == golds), numbers)


@dataclass(frozen=True, kw_only=True)
class LogicVista(Maths):
    """Options that may be right together ("B, C"): the reply must name the very same letters."""

    def document_of(self, row: Mapping[str, Any], options: list[str]) -> dict[str, Any]:
        """`answer` holds the letters in their order."""
        letters = sorted(set(re.findall(r"\b[A-Z]\b", str(row.get("answer") or "").upper())))
        return {"question": row["question"], "options": options or list(LETTERS[:8]), "answer": ", ".join(letters)}

    def question_of(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The options lie in the picture or in the question, which stays as it is."""
        return str(row["question"]), []

    def score(self, document: Document, prediction: str) -> ItemScore:
        """By one letter, or by the set of letters that the short answer is."""
        if gold_letter(document):
            return super().score(document, prediction)
        stated = find_answer_text(prediction) or ""
        letters = re.findall(r"\b([A-Z])\b", stated)
        is_list = re.fullmatch(r"[\s,;&()A-Z]*(?:and[\s,;&()A-Z]*)?", stated.strip(" .")) is not None
        named = ", ".join(sorted(set(letters))) if letters and is_list else None
        return ItemScore(float(named is not None and named == document["answer"]), named)


@dataclass(frozen=True, kw_only=True)
class WeMath(Maths):
    """Problems of two or three steps: each step is asked, and the problem. The headline is the strict score: 1 for a
    problem right with all of its steps, a half where only the combination fails. A problem that lacks one of its
    questions is left out and named; of a question that occurs twice the first counts."""

    metric: str = "score (strict)"
    kind: str = "extract"

    def document_of(self, row: Mapping[str, Any], options: list[str]) -> dict[str, Any]:
        """`ID` names the problem, `key` the question in it."""
        return {**super().document_of(row, options), "ID": str(row["ID"]), "key": str(row["key"])}

    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The question of a row."""
        for item in super().items(row, folder, settings):
            name = f"{item.document['ID']}/{item.document['key']}"
            yield replace(item, id=name, cluster=item.document["ID"])

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """Theirs gives the letter."""
        return ItemScore(float(fields.get("extracted") == document["answer"]), fields.get("extracted"))

    def official_input(self, scored: Sequence[ScoredItem]) -> dict[str, Any]:
        """Theirs read problem, question and whether it is right."""
        documents = [(entry.item.document, entry.score) for entry in scored]
        return {"records": [[document["ID"], document["key"], int(score >= 1)] for document, score in documents]}

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """Scores strict and loose, the four rates of both, and accuracy over questions."""
        summary = super().summarise(scored, scorer)
        counted, notes = split_gold(scored)
        problems: dict[str, dict[str, bool]] = defaultdict(dict)
        for entry in counted:
            problems[entry.item.document["ID"]].setdefault(entry.item.document["key"], entry.score >= 1)
        rates: dict[str, list[float]] = defaultdict(list)
        lacking = []
        for name, answers in problems.items():
            steps = 3 if any(key.startswith("3steps") for key in answers) else 2
            keys = [*(f"{steps}steps_{step}" for step in range(1, steps + 1)), f"{steps}steps_multi"]
            if set(keys) - set(answers):
                lacking.append(name)
                continue
            for kind, value in _rate_problem([answers[key] for key in keys[:-1]], answers[keys[-1]]).items():
                rates[kind].append(value)
        if lacking:
            notes = (*notes, f"{len(lacking)} problems lack questions and are left out ({', '.join(lacking[:3])})")
        table = {kind: 100 * sum(values) / len(values) for kind, values in rates.items()}
        accuracy = {} if summary.value is None else {"accuracy": summary.value}
        return replace(
            summary, value=table.get("score (strict)"), parts={"problems": {**table, **accuracy}}, notes=notes
        )


def _rate_problem(steps: Sequence[bool], combined: bool) -> dict[str, float]:
    """Which of the four kinds a problem is, and its score, by both rules for problems that are right as a whole."""
    generalises = all(steps) and not combined
    knows_little = not all(steps) and not combined
    return {
        "score (strict)": float(all(steps) and combined) + 0.5 * generalises,
        "score (loose)": float(any(steps) and combined) + 0.5 * generalises,
        "insufficient knowledge": float(knows_little), "inadequate generalisation": float(generalises),
        "complete mastery (strict)": float(all(steps) and combined),
        "complete mastery (loose)": float(any(steps) and combined),
        "rote memorisation (strict)": float(not all(steps) and combined),
        "rote memorisation (loose)": float(not any(steps) and combined),
    }  # fmt: skip


_UNSTATED: Final = "not stated where we looked"
TASKS = (
    MathVista(
        name="mathvista", title="MathVista (testmini)", measures="mathematics in figures, charts and photographs",
        source="AI4Math/MathVista", licence="CC-BY-SA 4.0", media="image", dimension="Math & Reasoning", rows=1000,
        official=(KIT, "lmms-eval-0.7.3", "lmms-eval-0.7.3-cli"), tables=(r"[^/]*testmini[^/]*\.(?:parquet|jsonl?)",),
        layouts=(("pid", "question", "question_type", "answer_type", "choices", "answer", "precision"),),
        labels_of=("question_type", "answer_type"),
    ),
    Maths(
        name="mathverse", title="MathVerse (testmini)", measures="geometry in versions from all text to all picture",
        source="AI4Math/MathVerse", licence=_UNSTATED, media="image", dimension="Math & Reasoning", rows=3940,
        tables=(r"testmini\.(?:parquet|json)", r"[^/]*testmini[^/]*\.(?:parquet|json)"), key="sample_index",
        layouts=(("sample_index", "problem_version", "question", "image", "answer", "question_type"),),
        labels_of=("problem_version", "question_type"),
    ),
    Maths(
        name="mathvision", title="MathVision (test)", measures="competition problems with pictures",
        source="MathLLMs/MathVision", licence=_UNSTATED, media="image", dimension="Math & Reasoning", rows=3040,
        tables=(r"[^/]*test-[^/]*\.parquet", r"test\.(?:parquet|jsonl?)"), labels_of=("subject", "level"),
        layouts=(("id", "question", "options", "image", "answer", "level", "subject"),),
    ),
    LogicVista(
        name="logicvista", title="LogicVista", measures="logical reasoning over pictures", source="lscpku/LogicVista",
        licence=_UNSTATED, media="image", dimension="Math & Reasoning", tables=(r"[^/]*\.(?:parquet|tsv|jsonl?)",),
        layouts=(("question", "image", "answer"),), labels_of=("skill",), rows=448, key="index",
    ),
    WeMath(
        name="wemath", title="WeMath (testmini)", measures="problems of steps, and whether the steps are mastered",
        source="We-Math/We-Math", licence=_UNSTATED, media="image", dimension="Math & Reasoning", official=(KIT,),
        tables=(r"[^/]*testmini[^/]*\.(?:parquet|jsonl?)",), rows=1740,
        layouts=(("ID", "key", "question", "option", "answer", "image_path"),),
    ),
)  # fmt: skip
