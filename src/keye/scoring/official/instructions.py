"""The 25 rules of IFEval as lmms-eval checks them: each instruction of a prompt, strictly and loosely.

Keywords and section marks are regular expressions there, so they are here. Sentences are counted by a rule of our own:
the original's trained model has no copy here, so `length_constraints:number_sentences` may differ by abbreviations.
Everything else is equal. Where the original would draw an argument that a prompt lacks, the instruction counts as not
followed and the result says `random`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from keye.errors import KeyeError
from keye.scoring.official.language import detect_language, split_sentences, split_words
from keye.scoring.official.registry import Document, Fields, register

Check = Callable[[str], bool]
Rule = Callable[..., Check]
"""Arguments of the instruction -> check of a reply. Both may raise what the original raises."""

Value = TypeVar("Value")

_LANGUAGES: Final = frozenset(
    "en es pt ar hi fr ru de ja it bn uk th ur ta te bg ko pl he fa vi ne sw kn mr gu pa ml fi".split()
)
_PARAGRAPH_MARK: Final = r"\s?\*\*\*\s?"


class _Drawn(Exception):
    """The original draws this argument."""


@register("ifeval", "item", "lmms-eval-0.7.3")
def score_instructions(document: Document, prediction: Any) -> Fields:
    """`strict` and `loose`: for each instruction, whether the reply follows it; `prompt_strict` and `prompt_loose`:
    whether it follows all of several. `error` is the exception that the original raises instead."""
    return _score(document, prediction, _RULES)


def check_instructions(document: Document, prediction: str) -> Fields:
    """The same for strict scores: a mark such as # is counted, where the original draws a letter to count instead."""
    return _score(document, prediction, {**_RULES, "keywords:letter_frequency": _count_mark})


def _score(document: Document, prediction: Any, rules: Mapping[str, Rule]) -> Fields:
    try:
        strict, checks = [], []
        for place, name in enumerate(document["instruction_id_list"]):
            checks.append(_build_check(rules[name], document["kwargs"][place]))
            strict.append(_follows(checks[-1], [prediction]))
        others = _loosen(prediction)
        loose = [follows or _follows(check, others) for follows, check in zip(strict, checks, strict=True)]
    except KeyeError:
        raise  # a package is missing: of ours, not of the original
    except re.error:
        return {"error": "error"}  # its name up to Python 3.12
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        return {"error": type(error).__name__}
    fields: Fields = {"strict": strict, "loose": loose}
    if len(checks) > 1:
        fields |= {"prompt_strict": all(strict), "prompt_loose": all(loose)}
    return fields | ({"random": True} if None in checks else {})


def _build_check(rule: Rule, arguments: Mapping[str, Any]) -> Check | None:
    """None where the original draws an argument; one that is empty or 0 is taken as lacking."""
    try:
        return rule(**{key: value for key, value in arguments.items() if value})
    except _Drawn:
        return None


def _follows(check: Check | None, texts: Sequence[str]) -> bool:
    return check is not None and any(text.strip() and check(text) for text in texts)


def _loosen(reply: str) -> list[str]:
    """Other forms of a reply: without asterisks; without its first line, its last, both, each of them with and without
    asterisks."""
    lines = reply.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys([reply.replace("*", ""), *shorter, *(text.replace("*", "") for text in shorter)]))


def _require(value: Value | None) -> Value:
    if value is None:
        raise _Drawn
    return value


def _require_count(value: Any) -> Any:
    if value is None or value < 0:
        raise _Drawn
    return value


def _compare(relation: str | None) -> Callable[[int, int], bool]:
    if relation not in (None, "less than", "at least"):
        raise ValueError(f"unknown relation {relation!r}")
    if _require(relation) == "less than":
        return lambda count, limit: count < limit
    return lambda count, limit: count >= limit


def _include_keywords(*, keywords: Sequence[str] | None = None) -> Check:
    patterns = sorted(_require(keywords))
    return lambda text: all(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def _count_keyword(*, keyword: str | None = None, frequency: int | None = None, relation: str | None = None) -> Check:
    compare, pattern, limit = _compare(relation), _require(keyword).strip(), _require_count(frequency)
    return lambda text: compare(len(re.findall(pattern, text, re.IGNORECASE)), limit)


def _forbid_words(forbidden_words: Sequence[str] | None = None) -> Check:
    words = sorted(set(_require(forbidden_words)))
    return lambda text: not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in words)


def _count_letter(
    *, letter: str | None = None, let_frequency: int | None = None, let_relation: str | None = None
) -> Check:
    check = _count_mark(letter=letter, let_frequency=let_frequency, let_relation=let_relation)
    if not letter or len(letter) > 1 or not "a" <= letter.lower() <= "z":
        raise _Drawn
    return check


def _count_mark(
    *, letter: str | None = None, let_frequency: int | None = None, let_relation: str | None = None
) -> Check:
    compare, wanted, limit = _compare(let_relation), _require(letter).lower(), _require_count(let_frequency)
    return lambda text: compare(text.lower().count(wanted), limit)


def _use_language(*, language: str | None = None) -> Check:
    wanted = _require(language)
    if wanted not in _LANGUAGES:
        raise KeyError(wanted)
    return lambda text: detect_language(text) in (wanted, None)


def _count_sentences(*, num_sentences: int | None = None, relation: str | None = None) -> Check:
    compare, limit = _compare(relation), _require_count(num_sentences)
    return lambda text: compare(len(split_sentences(text)), limit)


def _count_paragraphs(*, num_paragraphs: int | None = None) -> Check:
    wanted = _require_count(num_paragraphs)

    def check(text: str) -> bool:
        first, *others = re.split(_PARAGRAPH_MARK, text)
        if not others:
            return wanted == bool(first.strip())
        *inner, last = others
        return all(part.strip() for part in inner) and len(inner) + bool(first.strip()) + bool(last.strip()) == wanted

    return check


def _count_words(*, num_words: int | None = None, relation: str | None = None) -> Check:
    compare, limit = _compare(relation), _require_count(num_words)
    return lambda text: compare(len(re.findall(r"\w+", text)), limit)


def _begin_paragraph(
    num_paragraphs: int | None = None, nth_paragraph: int | None = None, first_word: str | None = None
) -> Check:
    count, place, wanted = _require_count(num_paragraphs), _require(nth_paragraph), _require(first_word).lower()
    if not 0 < place <= count:
        raise _Drawn

    def check(text: str) -> bool:
        paragraphs = text.split("\n\n")
        if sum(bool(paragraph.strip()) for paragraph in paragraphs) != count:
            return False
        words = paragraphs[place - 1].split()
        # A quotation mark before an apostrophe stays, and ends the word before it has begun.
        beginning = re.split("[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0] if words else ""
        return bool(words) and "".join(map(str.lower, beginning)) == wanted

    return check


def _count_placeholders(*, num_placeholders: int | None = None) -> Check:
    wanted = _require_count(num_placeholders)
    return lambda text: sum(map(_count_brackets, text.split("\n"))) >= wanted


def _count_brackets(line: str) -> int:
    """Pairs [...] of a line; the text within may hold further opening brackets."""
    count, place = 0, line.find("[")
    while place >= 0 and (end := line.find("]", place)) >= 0:
        count, place = count + 1, line.find("[", end)
    return count


def _add_postscript(*, postscript_marker: str | None = None) -> Check:
    marker = _require(postscript_marker).strip()
    if marker == "P.P.S":
        return lambda text: bool(re.search(r"p\.\s?p\.\s?s", text.lower()))
    if marker == "P.S.":
        return lambda text: bool(re.search(r"p\.\s?s\.", text.lower()))
    return lambda text: bool(re.search(rf"\s*{marker.lower()}.*$", text.lower(), re.MULTILINE))


def _count_bullets(*, num_bullets: int | None = None) -> Check:
    wanted = _require_count(num_bullets)
    return lambda text: _count_stars(text) + sum(line.lstrip()[:1] == "-" for line in text.split("\n")) == wanted


def _count_stars(text: str) -> int:
    """Lines that begin with one asterisk; alone on its line, it takes the next line in."""
    count, is_taken = 0, False
    lines = text.split("\n")
    for place, line in enumerate(lines):
        start = line.lstrip()[:2]
        if is_taken or not start.startswith("*") or start == "**":
            is_taken = False
            continue
        is_taken = start == "*"
        count += not is_taken or place + 1 < len(lines)
    return count


def _choose_answer() -> Check:
    answers = [f"My answer is {word}." for word in ("yes", "no", "maybe")]
    return lambda text: any(answer in text for answer in answers)


def _count_highlights(*, num_highlights: int | None = None) -> Check:
    wanted = _require_count(num_highlights)

    def check(text: str) -> bool:
        single = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", text)]
        double = [part[2:-2] for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
        return sum(bool(part.strip()) for part in single + double) >= wanted

    return check


def _count_sections(*, section_spliter: str | None = None, num_sections: int | None = None) -> Check:
    mark, wanted = _require(section_spliter).strip(), _require_count(num_sections)
    return lambda text: len(re.split(rf"\s?{mark}\s?\d+\s?", text)) - 1 >= wanted


def _write_json() -> Check:
    def check(text: str) -> bool:
        text = text.strip()
        for fence in ("```json", "```Json", "```JSON", "```"):
            text = text.removeprefix(fence)
        try:
            json.loads(text.removesuffix("```").strip())
        except ValueError:
            return False
        return True

    return check


def _write_title() -> Check:
    def has_title(line: str) -> bool:
        start, end = line.find("<<"), line.rfind(">>")
        return 0 <= start < end - 2 and bool(line[start : end + 2].lstrip("<").rstrip(">").strip())

    return lambda text: any(map(has_title, text.split("\n")))


def _give_two_responses() -> Check:
    def check(text: str) -> bool:
        first, *others = (part.strip() for part in text.split("******"))
        inner = others[:-1]
        responses = [part for part in (first, *others) if part]
        return all(inner) and len(responses) == 2 and responses[0] != responses[1]

    return check


def _repeat_prompt(*, prompt_to_repeat: str | None = None) -> Check:
    if not prompt_to_repeat:
        raise ValueError("no prompt to repeat")
    return lambda text: text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_with(*, end_phrase: str | None = None) -> Check:
    phrase = _require(end_phrase)
    return lambda text: text.strip().strip('"').lower().endswith(phrase.strip().lower())


def _count_capital_words(capital_frequency: int | None = None, capital_relation: str | None = None) -> Check:
    compare, limit = _compare(capital_relation), _require(capital_frequency)

    def check(text: str) -> bool:
        words = [word for sentence in split_sentences(text) for word in split_words(sentence)]
        return compare(sum(word.isupper() for word in words), limit)

    return check


def _write_capitals() -> Check:
    return lambda text: text.isupper() and detect_language(text) in ("en", None)


def _write_lower_case() -> Check:
    return lambda text: text.islower() and detect_language(text) in ("en", None)


def _avoid_commas() -> Check:
    return lambda text: "," not in text


def _quote() -> Check:
    return lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


_RULES: Final[Mapping[str, Rule]] = {
    "keywords:existence": _include_keywords,
    "keywords:frequency": _count_keyword,
    "keywords:forbidden_words": _forbid_words,
    "keywords:letter_frequency": _count_letter,
    "language:response_language": _use_language,
    "length_constraints:number_sentences": _count_sentences,
    "length_constraints:number_paragraphs": _count_paragraphs,
    "length_constraints:number_words": _count_words,
    "length_constraints:nth_paragraph_first_word": _begin_paragraph,
    "detectable_content:number_placeholders": _count_placeholders,
    "detectable_content:postscript": _add_postscript,
    "detectable_format:number_bullet_lists": _count_bullets,
    "detectable_format:constrained_response": _choose_answer,
    "detectable_format:number_highlighted_sections": _count_highlights,
    "detectable_format:multiple_sections": _count_sections,
    "detectable_format:json_format": _write_json,
    "detectable_format:title": _write_title,
    "combination:two_responses": _give_two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_with,
    "startend:quotation": _quote,
    "change_case:capital_word_frequency": _count_capital_words,
    "change_case:english_capital": _write_capitals,
    "change_case:english_lowercase": _write_lower_case,
    "punctuation:no_comma": _avoid_commas,
}
