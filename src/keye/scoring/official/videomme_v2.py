"""Video-MME-v2: letters A to H, groups of four questions, tables. The authors' script, VLMEvalKit, two of lmms-eval.

The authors, VLMEvalKit and lmms-eval 75571cf take the first capital A to H of a reply, whatever word it starts.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from keye.scoring.official.registry import Document, Fields, register

AUTHORS: Final = "video-mme-v2-b24176a"
VLMEVALKIT: Final = "vlmevalkit-e8e78f0"
LMMS: Final = "lmms-eval-0.7.3"
LMMS_OLD: Final = "lmms-eval-75571cf"

_PHRASES: Final = (
    "Final Answer:",
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
)
_LINE: Final = re.compile(r"(?:^|\n)[ \t]*(?:\*\*[ \t]*)?([A-H])(?:[ \t]*\*\*)?[ \t]*[.)]?[ \t]*$", re.IGNORECASE)
_START: Final = re.compile(r"[ \t]*(?:\*\*[ \t]*)?([A-H])(?:[ \t]*\*\*)?[ \t]*(?:[.)]|\r?\n|$)", re.IGNORECASE)
_STATED: Final = re.compile(
    rf"(?:{'|'.join(map(re.escape, _PHRASES))}|\b(?:answer|option)(?:\s+(?:is|would\s+be)|\s*:))[\s:*]*([A-H])\b",
    re.IGNORECASE,
)
_BOLD: Final = re.compile(r"\*\*\s*([A-H])(?=\s*\*\*|[.)])", re.IGNORECASE)

#: Points of a group by the number of its right answers: of all, or of those before the first wrong one.
_SQUARES: Final = (0.0, 100 / 16, 400 / 16, 900 / 16, 100.0)
_MIDDLE_PAIR: Final = (0.0, 100 / 12, 400 / 12, 700 / 12, 100.0)
_FIRST_PAIR: Final = (0.0, 10.0, 20.0, 50.0, 100.0)


def _find_capital(text: str) -> str:
    for phrase in _PHRASES:
        text = text.replace(phrase, "")
    capital = re.search("[A-H]", text)
    return capital.group() if capital else ""


def _find_stated_letter(text: str) -> str:
    """The letter of a line of its own, that after "answer" or "option", the only bold one; empty for none."""
    text = text.strip()
    alone = _LINE.search(text) or _START.match(text)
    if alone:
        return alone.group(1).upper()
    stated = _STATED.findall(text)
    if stated:
        return str(stated[-1]).upper()
    bold = {letter.upper() for letter in _BOLD.findall(text)}
    return bold.pop() if len(bold) == 1 else ""


def _find_option_text(text: str, options: str) -> str:
    """The letter of the only option whose text is part of the reply, else Z."""
    text = text.lower()
    letters = []
    for row, option in enumerate(options.split("\n")):
        letter = chr(ord("A") + row)
        _, is_labelled, wording = option.partition(f"{letter}.")
        if is_labelled and wording.strip(". \n").lower() in text:
            letters.append(letter)
    return letters[0] if len(letters) == 1 else "Z"


@register("videomme_v2", "item", AUTHORS, LMMS_OLD)
def score_authors_item(document: Document, prediction: str) -> Fields:
    letter = _find_capital(prediction)
    return {"extracted": letter, "score": int(letter == document["answer"])}


@register("videomme_v2", "item", VLMEVALKIT)
def score_vlmevalkit_item(document: Document, prediction: str) -> Fields:
    """Its second try reads the options in the question, where they aren't: it never finds a letter."""
    letter = _find_capital(prediction)
    how = "regex" if letter else "fallback"
    return {"extracted": letter or "Z", "how": how, "score": int((letter or "Z") == document["answer"])}


@register("videomme_v2", "item", LMMS)
def score_lmms_item(document: Document, prediction: str) -> Fields:
    letter = _find_stated_letter(prediction) or _find_option_text(prediction, document["options"])
    return {"extracted": letter, "score": int(letter.upper() == document["answer"].upper())}


def _score_group(group_type: str, structure: str, scores: Sequence[int]) -> float:
    """Points of a group; `ValueError` for an unknown type or structure, `IndexError` where a question is missing."""
    if group_type == "relevance":
        return _points(_SQUARES, sum(scores))
    if group_type != "logic":
        raise ValueError(f"Unknown group_type: {group_type}")
    right = next((place for place, score in enumerate(scores) if not score), len(scores))
    shape = ast.literal_eval(structure)
    if shape == [1, 2, 3, 4]:
        return _points(_SQUARES, right)
    if shape == [1, [2, 3], 4]:
        return _points(_MIDDLE_PAIR, right + (1 if right == 1 and scores[2] else 0))
    if shape == [[1, 2], 3, 4]:
        return _points(_FIRST_PAIR, right + (1 if right == 0 and scores[1] else 0))
    raise ValueError(f"Unknown group_structure_list: {shape}")


def _points(table: Sequence[float], right: int) -> float:
    return table[right] if 0 <= right < len(table) else 0.0


def _call(score: Callable[[], Fields]) -> Fields:
    """What the original raises for data that it doesn't expect becomes a field."""
    try:
        return score()
    except (ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        return {"error": type(error).__name__}


@register("videomme_v2", "group", AUTHORS, LMMS, LMMS_OLD)
def score_group(document: Document, prediction: None = None) -> Fields:
    return _call(
        lambda: {"score": _score_group(document["group_type"], document["group_structure"], document["scores"])}
    )


@register("videomme_v2", "group", VLMEVALKIT)
def score_vlmevalkit_group(document: Document, prediction: None = None) -> Fields:
    """Groups of relevance have the share of right answers too."""
    fields = score_group(document)
    if document["group_type"] == "relevance" and "error" not in fields:
        fields["linear"] = sum(document["scores"]) * 25.0
    return fields


@register("videomme_v2", "aggregate", AUTHORS, VLMEVALKIT)
def score_authors_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    return _call(lambda: {"metrics": _rate_by_place(document["records"])})


@register("videomme_v2", "aggregate", LMMS, LMMS_OLD)
def score_lmms_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    return _call(lambda: {"metrics": _rate_by_video(document["records"])})


def _rate_by_place(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Four rows in order are a group, whatever video they are of; its labels are those of the last row."""
    groups = [records[start : start + 4] for start in range(0, len(records), 4)]
    if len(groups) > (len(records) + 1) // 4:
        raise IndexError("list index out of range")
    points: dict[str, list[float]] = {name: [] for name in ("level_1", "level_2", "level_3")}
    points |= {"relevance_score": [], "relevance_linear_score": [], "logic_score": [], "total": []}
    heads: dict[str, dict[str, list[float]]] = {"second_head": defaultdict(list), "third_head": defaultdict(list)}
    has_levels = any(record["level"] is not None for record in records)
    for group in groups:
        last, scores = group[-1], [record["score"] for record in group]
        value = _score_group(last["group_type"], last["group_structure"], scores)
        points[f"{last['group_type']}_score"].append(value)
        if last["group_type"] == "relevance":
            points["relevance_linear_score"].append(sum(scores) * 25.0)
        if last["level"] is None and has_levels:
            raise ValueError("cannot convert float NaN to integer")  # None in a column of values is NaN
        if last["level"] is not None and str(last["level"]) != "None":
            points[f"level_{int(last['level'])}"].append(value)
        points["total"].append(value)
        for name, values in heads.items():
            values[last[name]].append(value)
    tables = {"final": points, **heads}
    names = {"final": "final_rating", "second_head": "second_head_rating", "third_head": "third_head_rating"}
    return {names[name]: {key: _mean(values) for key, values in table.items()} for name, table in tables.items()}


def _rate_by_video(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rows of a video are a group in the order of their question numbers; accuracies are over questions."""
    videos: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        videos[record["video_id"]].append(record)
    types: dict[str, list[float]] = defaultdict(list)
    levels: dict[Any, list[float]] = defaultdict(list)
    values = []
    for rows in videos.values():
        rows.sort(key=lambda row: int(row["question_id"].split("-")[-1]))
        first, last = rows[0], rows[-1]
        values.append(_score_group(first["group_type"], first["group_structure"], [row["score"] for row in rows]))
        types[first["group_type"]].append(values[-1])
        levels[last.get("level")].append(values[-1])
    for labels in (levels, {row["second_head"] for row in records}, {row["third_head"] for row in records}):
        sorted(labels)  # TypeError for None among texts or numbers: the original prints a table in this order
    metrics = {"overall_score": _mean(values), "overall_acc": _accuracy(records)}
    for name in ("relevance", "logic"):
        metrics[f"{name}_score"] = _mean(types[name])
        questions = [record for record in records if record["group_type"] == name]
        metrics[f"{name}_acc"] = _accuracy(questions) if types[name] else 0.0
    for level in (1, 2, 3):
        metrics[f"level_{level}_score"] = _mean(levels.get(level, levels.get(str(level), [])))
        by_level = [[record for record in records if record["level"] == name] for name in (level, str(level))]
        metrics[f"level_{level}_acc"] = _accuracy(by_level[0] or by_level[1])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _accuracy(rows: Iterable[Mapping[str, Any]]) -> float:
    scores = [row["score"] == 1 for row in rows]
    return sum(scores) * 100.0 / len(scores) if scores else 0.0
