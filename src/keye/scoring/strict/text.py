"""Short answers in replies and whether they are a gold answer: words, numbers within a tolerance, texts in pictures.

Knows no question. Linear in the text's length.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable

from keye.scoring.strict.expressions import match_expressions
from keye.scoring.strict.numbers import find_number, parse_number
from keye.scoring.strict.plain import to_ascii_forms, to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning

_CUE = re.compile(
    r"(?:(?:\b(?:final|correct|short|my|the) )?\b(?:answer|ans|result|response|conclusion)\b(?: to the"
    r" question)?[\"']?\s{0,3}(?:is|would be|should be|was|:|=|是|为){1,2}"
    r"|(?:答案|结果|结论)[\"']?\s{0,3}(?:是|为|:){1,2})[\s:\"']{0,4}",
    re.IGNORECASE,
)
_FIELD = re.compile(
    r"[\"'](?:final_?)?(?:answer|result|response)[\"']\s{0,3}:\s{0,3}(?:\"([^\"\n]{0,2000})\"|([^,}\n\"]{1,200}))",
    re.IGNORECASE,
)
_END = re.compile(
    r"\n|(?<=[^\W\d])[.!?](?=\s)|\u3002|(?<=\d)\.(?=\s)|; |, (?:because|since|as|which|so)\b| (?:because|since)\b|<\|"
)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_SPACE_OR_SIGN = re.compile(r"[^\w%$\u20ac\u00a3+\-/.:,]|(?<!\d)[.,:]|[.,:](?!\d)")
_NO_WORDS = re.compile(r"\W+")


def find_answer_text(text: str) -> str | None:
    r"""The short answer of a reply: what stands in `\boxed{}`, in the field "answer" of JSON, behind the last "answer
    is", or in the last line. None for an empty reply."""
    answer = strip_reasoning(text).conclusion
    if (boxed := find_boxed(answer)) is not None:
        return boxed.strip() or None
    if field := max(_FIELD.finditer(answer), key=lambda match: match.start(), default=None):
        return (field[1] if field[1] is not None else field[2]).strip() or None
    answer = answer.replace("**", "").strip()
    if cue := max(_CUE.finditer(answer), key=lambda match: match.start(), default=None):
        rest = answer[cue.end() :].lstrip()
        end = _END.search(rest)
        if stated := (rest[: end.start()] if end else rest).strip(" \t\"'`*"):
            return stated
    lines = [line for line in answer.splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def normalise_text(text: str) -> str:
    """A text for comparison: plain characters in lower case, no articles, punctuation (but within numbers) or accents'
    variants, single spaces."""
    text = _SPACE_OR_SIGN.sub(" ", _ARTICLE.sub(" ", to_plain(text).casefold()))
    return " ".join(text.split())


def match_text(text: str, golds: Iterable[str]) -> bool:
    """Whether the short answer of a reply, or all of it, equals a gold answer but for case, articles, punctuation and
    the spelling of numbers. An empty gold answer is never matched."""
    answer = strip_reasoning(text).conclusion
    stated = {normalise_text(candidate) for candidate in (answer, find_answer_text(text)) if candidate}
    stated.discard("")
    for gold in golds:
        key = normalise_text(gold)
        if not key:
            continue
        if key in stated:
            return True
        number = parse_number(gold)
        if number is not None and any(parse_number(candidate) == number for candidate in stated):
            return True
    return False


def match_relaxed(text: str, gold: str, *, tolerance: float = 0.05) -> bool:
    """Whether a reply about a chart says the gold answer: numbers may differ by `tolerance` of the gold one, units and
    percent signs aside; years and everything else must be equal."""
    stated = find_answer_text(text)
    if stated is None or not gold.strip():
        return False
    expected, number = parse_number(gold), parse_number(stated)
    if number is None and expected is not None:
        number = find_number(stated)
    if expected is None or number is None:
        return match_text(text, [gold])
    if is_percent(gold) != is_percent(stated) and (
        math.isclose(number, expected * 100) or math.isclose(number * 100, expected)
    ):
        return True
    if is_year(gold):
        return number == expected
    return abs(number - expected) <= tolerance * abs(expected) + 1e-12


def is_percent(text: str) -> bool:
    """Whether a number is written with a percent sign."""
    return to_ascii_forms(text).rstrip(" .").endswith("%")


def is_year(text: str) -> bool:
    """Whether a text is a year, 1500 to 2100, and nothing else."""
    return re.fullmatch(r"1[5-9]\d\d|20\d\d|2100", text.strip()) is not None


def contains_text(text: str, golds: Iterable[str]) -> bool:
    """Whether a reply that transcribes text has a gold answer in it as whole words; scripts without spaces have none.
    An empty gold answer is never contained."""
    words = _spaced(strip_reasoning(text).conclusion)
    return any(key in words for gold in golds if (key := _spaced(gold)).strip())


def _spaced(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])", r" \1 ", _NO_WORDS.sub(" ", text))
    return f" {' '.join(words.split())} "


def match_formula(text: str, golds: Iterable[str]) -> bool:
    """Whether the short answer of a reply is a gold formula or number, by `match_expressions`."""
    stated = find_answer_text(text)
    return stated is not None and any(match_expressions(stated, gold) for gold in golds if gold.strip())
