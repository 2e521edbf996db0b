"""Mathematics over pictures: MathVista (lmms-eval, VLMEvalKit), which mostly needs a judge, and WeMath (VLMEvalKit)."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

from keye.scoring.official.matching import infer_choice
from keye.scoring.official.registry import Document, Fields, register

LMMS: Final = "lmms-eval-0.7.3"
VLMEVALKIT: Final = "vlmevalkit-e8e78f0"

# --- MathVista ---

_QUOTE: Final = 'The answer is "'
_BRACKETED: Final = re.compile(r"\(([a-zA-Z])\)")


@register("mathvista", "item", LMMS)
def score_lmms_math(document: Document, prediction: str) -> Fields:
    """Without a judge: with and without its quick extraction; and what a judge that repeats the reply would give."""
    text = prediction.strip()
    fields: Fields = {}
    for name in ("default", "quick"):
        extracted = _extract_answer(document, text, quick=name == "quick")
        if extracted is None:
            fields[name] = {"judge_needed": True}
        else:
            fields[name] = {"extracted": extracted, **_normalize_and_compare(document, extracted)}
    return {**fields, "judge_echo": _normalize_and_compare(document, text)}


def _extract_answer(document: Document, text: str, *, quick: bool) -> str | None:
    """None where a judge is called."""
    if not text or (document["question_type"] == "multi_choice" and text in (document["choices"] or [])):
        return text
    try:
        if document["answer_type"] == "integer":
            return str(int(text))
        if document["answer_type"] == "float":
            return str(float(text))
    except ValueError:
        pass
    return _find_quoted(text) if quick else None


def _find_quoted(text: str) -> str | None:
    """What stands between 'The answer is "' and the last '".' of the same line; of the first line that has both."""
    for line in text.split("\n"):
        _, _, rest = line.partition(_QUOTE)
        if '".' in rest:
            return rest.rpartition('".')[0]
    return None


def _normalize_and_compare(document: Document, text: str) -> Fields:
    normalized = _normalize(document, text)
    answer = document["answer"]
    is_right = answer is not None and str(normalized).strip() == str(answer).strip()
    return {"normalized": normalized, "score": int(is_right)}


def _normalize(document: Document, text: str) -> str | None:
    """The text of an option; a number in the form of the gold answers; None for what isn't a number."""
    if document["question_type"] == "multi_choice":
        return _choose_option(text.strip(), document["choices"])
    precision = document.get("precision", 0)
    try:
        if document["answer_type"] == "integer":
            return str(int(float(text)))
        if document["answer_type"] == "float":
            return str(round(float(text), None if precision is None else int(precision)))
    except (ValueError, OverflowError):
        return None
    return text


def _choose_option(text: str, choices: Sequence[str]) -> str:
    """The option of the first letter in brackets or of the letter alone; otherwise the closest by edit distance."""
    bracketed = _BRACKETED.search(text)
    if bracketed:
        text = bracketed.group(1).upper()
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    if text in letters:
        return choices[letters.index(text)]
    return min(choices, key=lambda choice: _edit_distance(text, choice))


def _edit_distance(text: str, choice: str) -> int:
    """Insertions, deletions and replacements that turn one text into the other.

    Bit-parallel (Myers 1999): bit i of `higher` and `lower` says whether the table's entry for i + 1 characters of the
    choice is one above or below that for i; a whole column is updated by a few operations on integers.
    """
    if not choice:
        return len(text)
    places: dict[str, int] = {}
    for place, mark in enumerate(choice):
        places[mark] = places.get(mark, 0) | 1 << place
    everything, last = (1 << len(choice)) - 1, 1 << len(choice) - 1
    higher, lower, distance = everything, 0, len(choice)
    for mark in text:
        equal = places.get(mark, 0)
        diagonal = (((equal & higher) + higher) ^ higher) | equal | lower
        rising = lower | ~(diagonal | higher)
        falling = higher & diagonal
        distance += bool(rising & last) - bool(falling & last)
        rising, falling = rising << 1 | 1, falling << 1
        higher = (falling | ~(diagonal | rising)) & everything
        lower = rising & diagonal & everything
    return distance


@register("mathvista", "item", VLMEVALKIT)
def score_vlmevalkit_math(document: Document, prediction: str) -> Fields:
    """`prefetch`: what its rules take without a judge, False for nothing; a right 0 is taken for nothing."""
    value, gold = _read_answer(document, prediction)
    is_choice = document["question_type"] == "multi_choice"
    prefetch = value if is_choice or value == gold else False
    value, gold = _read_answer(document, prefetch or prediction)
    return {"prefetch": prefetch, "score_if_judge_echoes": int(value == gold)}


def _read_answer(document: Document, response: Any) -> tuple[Any, Any]:
    """The reply's value and the gold one. A list is compared as the text "None"."""
    if document["question_type"] == "multi_choice":
        choices = document["choices"]
        options = ast.literal_eval(choices) if isinstance(choices, str) else choices
        letter = infer_choice(str(response), dict(zip(string.ascii_uppercase, options, strict=False)))
        return (False if letter is None else letter), document["answer_option"]
    value, gold = None, document["answer"]
    kind = {"integer": int, "float": float}.get(document["answer_type"])
    if kind is None:
        return "None", str(gold)
    try:
        value = kind(response)
        gold = kind(gold)
    except ValueError:
        pass
    return value, gold


# --- WeMath ---

#: What the golden lines of kind "extract" take for the right letter; rows of the data name theirs.
_DEFAULT_ANSWER: Final = "B"
_LETTERS: Final = "ABCDEFGH"
#: The original's denominator of the score, however many problems were run.
_PROBLEMS: Final = 525
_MARKS: Final = re.compile("[><:.]")


@register("wemath", "extract", VLMEVALKIT)
def score_wemath(document: Document, prediction: str) -> Fields:
    """The first character after the last "Answer", where it is a letter from A to H."""
    text = _MARKS.sub("", str(prediction).split("Answer")[-1].strip()).strip()
    letter = text[0] if text and text[0] in _LETTERS else None
    return {"extracted": letter, "joker": letter == document.get("answer", _DEFAULT_ANSWER)}


@register("wemath", "aggregate", VLMEVALKIT)
def score_wemath_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    """Problems of two or three steps by which steps and which combination of them are right."""
    problems = [problem for steps in (2, 3) for problem in _join_steps(document["records"], steps)]
    counts = _count_kinds(problems)
    try:
        rates = _rate_kinds(counts, len(problems))
    except ZeroDivisionError:
        return {"error": "ZeroDivisionError"}
    main = {}
    for name in ("strict", "loose"):
        lost = 0.5 * counts["InadequateGeneralization"] + counts[f"RoteMemorization_{name}"]
        title = f"({name.title()})"
        main[f"Score {title}"] = f"{(_PROBLEMS - lost - counts['InsufficientKnowledge']) / _PROBLEMS:.2%}"
        for kind in ("InsufficientKnowledge", "InadequateGeneralization"):
            main[f"{kind} {title}"] = f"{rates[f'{kind}_rate']} ({counts[kind]})"
        for kind in ("CompleteMastery", "RoteMemorization"):
            main[f"{kind} {title}"] = f"{rates[f'{kind}_{name}_rate']} ({counts[f'{kind}_{name}']})"
    return {"metrics": {"total_counts": counts, "rates": rates, "n": len(problems), "main": main}}


Problem = tuple[Sequence[bool | None], bool | None]
"""Right or wrong of each step, and of the whole; None where a row is missing."""


def _join_steps(records: Sequence[Sequence[Any]], steps: int) -> list[Problem]:
    """Problems that have a first step, as a table's left join has them: rows that occur twice multiply."""
    rows: dict[tuple[str, str], list[bool | None]] = {}
    for name, key, hit in records:
        rows.setdefault((name, key), []).append(bool(hit))
    keys = [f"{steps}steps_{step}" for step in (*range(2, steps + 1), "multi")]
    problems: list[Problem] = []
    for name, key, hit in records:
        if key == f"{steps}steps_1":
            for others in product(*(rows.get((name, other), [None]) for other in keys)):
                problems.append(((bool(hit), *others[:-1]), others[-1]))
    return problems


def _count_kinds(problems: Sequence[Problem]) -> dict[str, int]:
    counts = dict.fromkeys(
        ("InadequateGeneralization", "InsufficientKnowledge", "CompleteMastery_loose", "CompleteMastery_strict"), 0
    )
    counts |= {"RoteMemorization_loose": 0, "RoteMemorization_strict": 0}
    for steps, combined in problems:
        has_wrong, has_right = any(step is False for step in steps), any(step is True for step in steps)
        all_right, all_wrong = all(step is True for step in steps), all(step is False for step in steps)
        counts["InadequateGeneralization"] += all_right and combined is False
        counts["InsufficientKnowledge"] += has_wrong and combined is False
        counts["CompleteMastery_loose"] += has_right and combined is True
        counts["CompleteMastery_strict"] += all_right and combined is True
        counts["RoteMemorization_loose"] += all_wrong and combined is True
        counts["RoteMemorization_strict"] += has_wrong and combined is True
    return counts


def _rate_kinds(counts: Mapping[str, int], total: int) -> dict[str, str]:
    """Of all problems; rote memorization of those whose combination is right."""
    rates = {name: count / total for name, count in counts.items() if not name.startswith("RoteMemorization")}
    for name in ("loose", "strict"):
        rote = counts[f"RoteMemorization_{name}"]
        rates[f"RoteMemorization_{name}"] = rote / (counts[f"CompleteMastery_{name}"] + rote)
    return {f"{name}_rate": f"{rate:.2%}" for name, rate in rates.items()}
