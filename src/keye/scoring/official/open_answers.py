"""Short answers that aren't letters: MMVU, OCRBench, ChartQA, CountBench. lmms-eval and VLMEvalKit.

Most compare by parts of texts: an empty reply to MMVU is right, and "banana" has the letter "a" of OCRBench.
"""

from __future__ import annotations

import ast
import contextlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from keye.scoring.official.registry import Document, Fields, register

LMMS: Final = "lmms-eval-0.7.3"
VLMEVALKIT: Final = "vlmevalkit-e8e78f0"

# --- MMVU ---

#: Subjects by their discipline; rows of others leave the denominator.
_SUBJECTS: Final = frozenset(
    "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science Neurobiology Electromagnetism "
    "Thermodynamics Mechanics Civil_Engineering Electrical_Engineering Mechanical_Engineering Biomedical_Engineering "
    "Electronics_and_Communication Computer_Science Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy "
    "Dentistry Art Literature History Law Economics Management".split()
)
_SUPERSCRIPTS: Final = str.maketrans(dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{digit}" for digit in range(10)), strict=True)))
_ORDER: Final = re.compile(r"o\s*\(")
_NUMBER: Final = re.compile(r"\d+(?:\.\d*)?")


@register("mmvu", "item", LMMS)
def score_mmvu(document: Document, prediction: Any) -> Fields:
    """A wrong answer to an open question goes to a judge."""
    text, answer = str(prediction).strip(), str(document["answer"]).strip()
    if document["question_type"] == "multiple-choice":
        return {"score": int(_match_mmvu_choice(document, text, answer)), "judge_needed": False}
    is_right = _match_mmvu_text(text, answer)
    return {"score": int(is_right), "judge_needed": not is_right}


def _match_mmvu_choice(document: Document, text: str, answer: str) -> bool:
    """The letter as a word anywhere, be it the article, or the option's text, or the letter and a word of the text."""
    first = re.search(r"\b([A-E])\b", text, re.IGNORECASE)
    if first and first.group(1).upper() == answer.upper():
        return True
    has_answer = answer.upper() in text.upper()
    if has_answer and re.search(rf"\b{re.escape(answer)}\b", text, re.IGNORECASE):
        return True
    choices = document.get("choices") or {}
    if answer not in choices:
        return False
    choice, text = choices[answer].strip().lower(), text.lower()
    words = [word.strip(string.punctuation) for word in choice.split()]
    return choice in text or (has_answer and any(word in text for word in words if len(word) > 2))


def _match_mmvu_text(prediction: str, gold: str) -> bool:
    """Either text is part of the other, or the first numbers, all longer words or the O() terms are equal."""
    # Superscripts go after letters are lower: lower() leaves them as they are
    text, answer = (" ".join(value.lower().translate(_SUPERSCRIPTS).split()) for value in (prediction, gold))
    if answer in text or text in answer:
        return True
    numbers, gold_numbers = _NUMBER.search(text), _NUMBER.search(answer)
    if numbers and gold_numbers and abs(float(gold_numbers.group()) - float(numbers.group())) < 0.01:
        return True
    words, gold_words = (
        [word.strip(string.punctuation) for word in value.split() if word.strip(string.punctuation)]
        for value in (text, answer)
    )
    if 2 <= len(gold_words) <= 5 and all(word in words for word in gold_words if len(word) > 2):
        return True
    order = _find_order(text)
    return order is not None and order == _find_order(answer)


def _find_order(text: str) -> str | None:
    """The first `o(...)` of a text in lower case that has something in its brackets."""
    for match in _ORDER.finditer(text):
        end = text.find(")", match.end())
        if end < 0:
            return None
        if end > match.end():
            return text[match.start() : end + 1]
    return None


@register("mmvu", "aggregate", LMMS)
def score_mmvu_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    """Accuracy in percent over known subjects; what would go to a judge is wrong."""
    scores = [score_mmvu(row, text)["score"] for row, text in items if row["category"] in _SUBJECTS]
    overall = 100 * sum(scores) / len(scores) if scores else 0
    return {"metrics": {"overall": overall}, "note": "rule part only, judge counted wrong"}


# --- OCRBench ---

_RECOGNITION: Final = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_FORMULAS: Final = "Handwritten Mathematical Expression Recognition"
_OTHER_TYPES: Final = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", _FORMULAS)
#: Full-width forms of ASCII, and the wide space.
_NARROW: Final = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def _golds(document: Document) -> list[str]:
    answer = document["answer"]
    return list(answer) if isinstance(answer, list) else [answer]


def _contains_gold(document: Document, prediction: str, *, is_formula: bool, fold: bool) -> bool:
    """A gold answer is part of the reply: formulas without spaces, others in lower case."""

    def clean(text: str) -> str:
        if is_formula:
            return text.strip().replace("\n", "").replace(" ", "")
        return (text.translate(_NARROW) if fold else text).lower().strip().replace("\n", " ")

    text = clean(prediction)
    return any(clean(gold) in text for gold in _golds(document))


@register("ocrbench", "item", LMMS)
def score_lmms_ocr(document: Document, prediction: str) -> Fields:
    is_formula = document["dataset"] == "HME100k"
    return {"score": int(_contains_gold(document, prediction.strip(), is_formula=is_formula, fold=True))}


@register("ocrbench", "item", VLMEVALKIT)
def score_vlmevalkit_ocr(document: Document, prediction: str) -> Fields:
    is_formula = document["question_type"] == _FORMULAS
    return {"score": int(_contains_gold(document, str(prediction), is_formula=is_formula, fold=False))}


@register("ocrbench", "aggregate", LMMS)
def score_lmms_ocr_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    """Counts of the module outlive a call: the same set scores twice as much the second time."""
    known = {*_RECOGNITION, *_OTHER_TYPES}
    for row, _ in items:
        if row["question_type"] not in known:
            return {"error": "KeyError"}
    score = sum(score_lmms_ocr(row, text)["score"] for row, text in items)
    return {"metrics": {"final_over_1000": score / 1000}, "second_call_same_process": 2 * score / 1000}


@register("ocrbench", "aggregate", VLMEVALKIT)
def score_vlmevalkit_ocr_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    counts: Counter[str] = Counter()
    for row, text in items:
        right = score_vlmevalkit_ocr(row, text)["score"]
        if right and row["question_type"] not in (*_RECOGNITION, *_OTHER_TYPES):
            return {"error": "KeyError"}
        counts[row["question_type"]] += right
    metrics: dict[str, float] = {"Text Recognition": sum(counts[name] for name in _RECOGNITION)}
    metrics |= {name: counts[name] for name in _OTHER_TYPES}
    total = sum(metrics.values())
    return {"metrics": {**metrics, "Final Score": total, "Final Score Norm": total / 10}}


# --- ChartQA ---


@register("chartqa", "item", LMMS)
def score_lmms_chart(document: Document, prediction: str) -> Fields:
    return {"score": float(_is_close(prediction, document["answer"]))}


@register("chartqa", "item", VLMEVALKIT)
def score_vlmevalkit_chart(document: Document, prediction: str) -> Fields:
    """A gold answer that reads as a Python list counts as several."""
    value = document["answer"]
    if isinstance(value, str) and value.lstrip(" \t").startswith("["):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    golds = value if isinstance(value, list) else [document["answer"]]
    return {"score": float(any(_is_close(prediction.strip(), str(gold)) for gold in golds))}


def _is_close(prediction: str, gold: str) -> bool:
    """Numbers within 5 % of the gold; other texts, and all where the gold is 0, equal but for case."""
    number, gold_number = _to_number(prediction), _to_number(gold)
    if number is not None and gold_number:
        return abs(number - gold_number) / abs(gold_number) <= 0.05
    return prediction.lower() == gold.lower()


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


# --- CountBench ---

_WORDS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_NUMERALS: Final = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}


@register("countbench", "item", LMMS)
def score_count(document: Document, prediction: str) -> Fields:
    """Two tasks of lmms-eval: equal texts; equal texts with number words as numerals."""
    gold = str(document["number"])
    is_equal = _to_numeral(str(prediction)) == _to_numeral(gold)
    return {"countbenchqa": float(prediction.strip() == gold), "countbench": float(is_equal)}


def _to_numeral(text: str) -> str:
    text = text.strip().lower()
    return _NUMERALS.get(text, text)
