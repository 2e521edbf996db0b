"""The option that a reply chooses, None where it chooses none or several.

A letter that stands alone, in a box, in a field of JSON or before its option's text is the answer. Otherwise the
strongest of what the reply's clauses claim (`claims`) decides; where they name several letters, and no later one
corrects the earlier, nothing was answered. Options' texts are looked for only where no letter is named. Linear in the
text's length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from keye.scoring.strict.claims import ANSWER_NOUN, COPULA, EXPLICIT, HEDGED, Claim, read_claims
from keye.scoring.strict.marks import find_marked
from keye.scoring.strict.plain import any_of, shorten, simplify_han, to_ascii_forms, to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning
from keye.scoring.strict.times import spell_english_numbers
from keye.scoring.strict.yes_no import read_yes_no

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_BARE = re.compile(r"[\W_]*([A-Za-z])(?![+#\u00b0])[\W_]*")
_LETTER_AND_TEXT = re.compile(r"[\W_]*(?<![A-Za-z])([A-Za-z])(?:\s*[.):\]},\->、。]+\s*|\s+)(\S.*)", re.DOTALL)
_CYRILLIC_AND_GREEK = "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u0391\u0392\u0395\u0397\u0399"
_LOOKALIKES = str.maketrans(_CYRILLIC_AND_GREEK, "ABCEHIJABEHI")
_LOOKALIKE = re.compile(rf"(?<!\w)[{_CYRILLIC_AND_GREEK}](?!\w)(?! [\u0370-\u04ff])")
_FIELD = re.compile(
    r"[\"'](?:(?:final|correct|selected|chosen|predicted|best|my)[_ ]?)?"
    + any_of("answer choice option letter prediction label response result")
    + r"(?:[_ ]?(?:letter|choice|option|id|key))?[\"']\s{0,4}:\s{0,4}"
    r"(\"[^\"\n]{0,400}\"|'[^'\n]{0,400}'|\[[^\]]{0,400}\]|[^,}\n\"'\[]{1,80})",
    re.IGNORECASE,
)
_ATTRIBUTE = re.compile(
    (
        r"<\w{1,20}\s[^<>]{0,80}?(?:answer|choice|option|value"
        r"|letter)\s?=\s?[\"']([^\"'<>]{1,200})[\"'][^<>]{0,80}>"
    ),
    re.IGNORECASE,
)
_ITEM = re.compile(r"(?:^|(?<=\s))[(\[]?([A-Za-z])[.):\]]+(?=\s|[^\x00-\x7f])", re.MULTILINE)
_ITEM_END = re.compile(r"\n|(?<=\w\w)[.!?;](?=\s)|。")
_VERDICT = re.compile(
    r"\b" + any_of("correct incorrect right wrong true false yes no not \\w{2,6}n't never") + r"\b|[对错✓✔✅✗✘❌]",
    re.IGNORECASE,
)
_TEXT_CUE = re.compile(rf"{ANSWER_NOUN}[^.;?!\n]{{0,48}}?{COPULA}\s*(?:the )?", re.IGNORECASE)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(
    rf"[{_CJK}]|\d+(?:[.,:]\d+)*|[^\W\d_{_CJK}]+(?:'[^\W\d_{_CJK}]+)*|[-+=<>^*/%$\u20ac\u00a3\u00b0√\u00d7\u00f7\\]"
)
_DIGITS = re.compile(r"[\d.,:/ -]+")
#: "one" that counts nothing.
_PRONOUN = re.compile(r"(?<=\w) one\b", re.IGNORECASE)
_ARTICLE = re.compile(r"^\W*(?:an?|the)\s+(?=\w)")
_NOT = ("not", "never", "不")
_REFUSAL = re.compile(
    r"\bnone of\b|\bno(?:ne)? (?:option|answer|choice|correct|single)|\bneither of\b|\ball of\b|\bboth\b"
    r"|\b(?:can(?:not|'t)|unable to|could not|couldn't|impossible to|hard to|difficult to) (?:\w+ ){0,2}"
    + any_of("determine tell say answer decide identify know see view help be_determined")
    + (
        r"|\bdo(?:n't| not) know\b|\bunknown\b|\bnot (?:sure|certain|enough)\b|\bunclear\b|以上|无法|不能"
        r"|不知道|不确定|都不|都对"
    ),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Options:
    """The options of a question: letters, and the letters of texts that only one option has."""

    letters: str
    by_text: dict[str, str]
    is_yes_no: bool
    are_numbers: bool


def find_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply chooses, None where it chooses none or several.

    `options` are the texts in order, without their letters (or with: "A. text"); their number bounds the letters. A
    reply that consists of reasoning alone is read for its conclusion.
    """
    stripped = strip_reasoning(text)
    if not stripped.conclusion:
        return None
    choices = _read_options(tuple(options))
    if stripped.answer:
        return _read_answer(shorten(stripped.answer), choices)
    return _read_reasoning(shorten(stripped.reasoning), choices)


@lru_cache(maxsize=1024)
def _read_options(options: tuple[str, ...]) -> _Options:
    letters = _ALPHABET[: len(options)]
    keys = [_key(_without_letter(str(text).strip(), letter)) for text, letter in zip(options, letters, strict=False)]
    by_text = {key: letter for key, letter in zip(keys, letters, strict=True) if key and keys.count(key) == 1}
    are_numbers = bool(by_text) and all(_DIGITS.fullmatch(key) for key in by_text)
    return _Options(letters, by_text, set(by_text) in ({"yes", "no"}, {"是", "否"}), are_numbers)


def _without_letter(text: str, letter: str) -> str:
    """The text of "A. text" or "(A) text"."""
    inner = text.removeprefix("(")
    return inner[1:].lstrip(".):：、 ") if inner[:1] == letter and inner[1:2] in tuple(".):：、") else text


def _key(text: str) -> str:
    """A text for comparison: words in lower case, numbers and signs of arithmetic, a space between any two,
    without an article before them."""
    return " ".join(_WORD.findall(_ARTICLE.sub("", simplify_han(to_plain(text)).casefold(), count=1)))


def _read_answer(text: str, options: _Options) -> str | None:
    """The letter of an answer without reasoning."""
    text = simplify_han(to_ascii_forms(text))
    if not text.isascii():
        text = _LOOKALIKE.sub(lambda match: match[0].translate(_LOOKALIKES), text)
    if match := _BARE.fullmatch(text):
        return _bound(match[1], options)
    if (boxed := find_boxed(text)) is not None:
        return _read_answer(boxed, options)
    if fields := _FIELD.findall(text):
        return _read_value(fields[-1], options)
    if "=" in text and (attribute := _ATTRIBUTE.search(text)):
        return _read_answer(attribute[1], options)
    if marked := find_marked(text, options.letters):
        return marked
    text = to_plain(text)
    if match := _BARE.fullmatch(text):
        return _bound(match[1], options)
    if letter := options.by_text.get(_key(text)):
        return letter
    if match := _LETTER_AND_TEXT.fullmatch(text):
        stated = options.by_text.get(_key(match[2]))
        if stated is not None:
            return stated if stated == match[1].upper() else None
    text = _without_echo(text, options)
    claims = list(read_claims(text, options.letters))
    return _decide(claims) if claims else _find_text(text, options)


def _read_reasoning(text: str, options: _Options) -> str | None:
    """The conclusion of a reply that has nothing but reasoning: what its last sentence that names a letter says."""
    claims = list(read_claims(_without_echo(simplify_han(to_plain(text)), options), options.letters))
    if not claims:
        return None
    letter = _decide(claims) if any(claim.strength >= EXPLICIT for claim in claims) else None
    return letter or _decide([claim for claim in claims if claim.sentence == claims[-1].sentence])


def _bound(letter: str, options: _Options) -> str | None:
    return letter.upper() if letter.upper() in options.letters else None


def _read_value(value: str, options: _Options) -> str | None:
    """The letter of a value in JSON: a string, a list of one, a bare word."""
    if value.startswith("["):
        entries = [entry for entry in value[1:-1].split(",") if entry.strip()]
        return _read_value(entries[0].strip(), options) if len(entries) == 1 else None
    return _read_answer(value.strip("\"' "), options)


def _without_echo(text: str, options: _Options) -> str:
    """The text without a list of all options that repeats the question; a list of verdicts on them stays."""
    need = min(3, len(options.letters))
    if need < 2 or options.letters[need - 1] not in text.upper():
        return text
    items = list(_ITEM.finditer(text))
    for start in range(len(items) - need + 1):
        count = 0
        while start + count < len(items) and options.letters.startswith(items[start + count][1].upper(), count):
            count += 1
        run = items[start : start + count]
        if count < need:
            continue
        mark = _ITEM_END.search(text, run[-1].end())
        end = len(text) if mark is None else mark.start()
        bounds = [item.start() for item in run[1:]] + [end]
        bodies = [text[item.end() : bound] for item, bound in zip(run, bounds, strict=True)]
        own = [options.by_text.get(_key(body)) == letter for body, letter in zip(bodies, options.letters, strict=False)]
        if all(own) or not any(_VERDICT.search(body) for body in bodies):
            return f"{text[: run[0].start()]}\n{text[end:]}"
    return text


def _decide(claims: list[Claim]) -> str | None:
    """The letter that the strongest claims agree on; a correction takes back what was claimed before it."""
    corrections = [claim.order for claim in claims if claim.corrects and claim.strength > HEDGED]
    if corrections:
        claims = [claim for claim in claims if claim.order >= corrections[-1]]
    best = max(claim.strength for claim in claims)
    letters = {claim.letter for claim in claims if claim.strength == best}
    return letters.pop() if len(letters) == 1 else None


def _find_text(text: str, options: _Options) -> str | None:
    """The letter of the only option whose text is in a reply, None where it has several, denies it or refuses."""
    if options.is_yes_no:
        answer = read_yes_no(text)
        keys = {True: ("yes", "是"), False: ("no", "否"), None: ()}[answer]
        return next((options.by_text[key] for key in keys if key in options.by_text), None)
    if options.are_numbers:
        text = spell_english_numbers(_PRONOUN.sub(" ", text))
    words = f" {_key(text)} "
    longest_first = sorted(options.by_text, key=len, reverse=True)
    rest, named = words, []
    for key in longest_first:
        if f" {key} " in rest:
            named.append(key)
            rest = rest.replace(f" {key} ", " | ")
    if len(named) > 1:
        cue = max((match.end() for match in _TEXT_CUE.finditer(text)), default=None)
        tail = "" if cue is None else f"{_key(text[cue:])} "
        return next((options.by_text[key] for key in longest_first if tail.startswith(f"{key} ")), None)
    if not named or (_REFUSAL.search(text) and not _REFUSAL.search(named[0])):
        return None
    before = words[: words.index(f" {named[0]} ")].split()[-3:]
    return None if any(word in _NOT or word.endswith("n't") for word in before) else options.by_text[named[0]]
