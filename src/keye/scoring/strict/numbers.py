"""Numbers in replies: digits with thousands and decimals, fractions, powers of ten, words in English and Chinese.

Linear in the text's length.
"""

from __future__ import annotations

import re

from keye.scoring.strict.plain import to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning
from keye.scoring.strict.times import spell_english_numbers, spell_han

_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3}){1,6}(?!\d)(?:\.\d{1,15})?|\d{1,18}(?:\.\d{0,15})?|\.\d{1,15})(?:[eE][+-]?\d{1,2}(?!\d))?"
)
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_.])(?P<sign>[-+])?[$\u20ac\u00a3\u00a5]?\s?(?P<digits>{_DIGITS})(?:\s?/\s?(?P<below>\d{{1,9}}(?:\.\d{{1,9}})?)(?![\d/]))?(?P<scale>\s?(?:thousand"
    rf"|million|billion|trillion|mn|bn)\b|[kKMB]\b)?"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s?\{?(-?\d{1,12}(?:\.\d{1,9})?)\}?\s?\{?(\d{1,12}(?:\.\d{1,9})?)\}?")
_SCALES = {
    "thousand": 1e3,
    "k": 1e3,
    "K": 1e3,
    "million": 1e6,
    "mn": 1e6,
    "M": 1e6,
    "billion": 1e9,
    "bn": 1e9,
    "B": 1e9,
    "trillion": 1e12,
}
_CUE = re.compile(
    r"(?:\b(?:answer|result|total|count|sum|number of [\w ]{1,40}?|value)\b[\"']?\s{0,3}(?:is|are|would be"
    r"|should be|:|=){1,2}|=|\b(?:so|thus|hence|therefore|makes|gives)\b(?: it is| that is)?|\b(?:in total"
    r"|altogether|total of)\b[:,]?|(?:答案|结果|总共|一共|共)(?:是|为"
    r"|有|:)?)\W{0,4}"
    r"(?:(?:there (?:are|is)|about|approximately|exactly|\$|\\\(|\\\[)\s{0,2})?",
    re.IGNORECASE,
)
_TOTAL_AFTER = re.compile(r"\s{1,2}(?:[\w-]{1,20} ){0,3}?(?:in total|altogether|overall|in all)\b", re.IGNORECASE)


def find_number(text: str) -> float | None:
    """The number that a reply answers: in `\\boxed{}`, behind the last "answer is" or "total", or the only one in it.

    None for none, and for several different ones of which none is marked as the answer.
    """
    text = strip_reasoning(text).conclusion
    if (boxed := find_boxed(text)) is not None:
        text = boxed
    text = _spell(text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    starts = {match.start(): match for match in numbers}
    for cue in reversed(list(_CUE.finditer(text))):
        for position in range(cue.end(), max(cue.start(), cue.end() - 4) - 1, -1):
            if position in starts:
                return _value(starts[position])
    totals = [match for match in numbers if _TOTAL_AFTER.match(text[match.end() : match.end() + 80])]
    values = {_value(match) for match in totals or numbers}
    return values.pop() if len(values) == 1 else None


def parse_number(text: str) -> float | None:
    """The value of a text that is a number with a sign, currency, percent or unit at most; None for anything else."""
    text = _spell(text).strip(" \t\n.\"'")
    match = _NUMBER.match(text)
    if match is None or len(text) - match.end() > 24 or re.search(r"\d", text[match.end() :]):
        return None
    return _value(match)


def _spell(text: str) -> str:
    r"""Plain text with digits for words, and `\frac{a}{b}` as a/b."""
    if "frac" in text:
        text = _FRACTION.sub(r"\1/\2", text)
    return spell_han(spell_english_numbers(to_plain(text.replace("\\%", "%"))), is_counted=True)


def _value(match: re.Match[str]) -> float:
    value = float(match["digits"].replace(",", ""))
    if match["below"] and float(match["below"]):
        value /= float(match["below"])
    if match["scale"]:
        value *= _SCALES[match["scale"].strip()]
    return -value if match["sign"] == "-" else value
