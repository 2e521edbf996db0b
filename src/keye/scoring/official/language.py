"""Languages, sentences and words as the packages langdetect and NLTK find them, which lmms-eval's IFEval calls.

langdetect itself is used, with the seed 0: without one its answers change from run to run. NLTK's words are reproduced.
Its sentences come from a trained model; here a rule finds them, which differs where an abbreviation is not listed.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

from keye.errors import missing_package

#: Words whose period ends no sentence, in lower case without it.
_ABBREVIATIONS: Final = frozenset(
    "mr mrs ms dr prof rev gen col capt lt sgt sr jr st inc ltd co corp vs e.g i.e a.m p.m u.s u.k u.n ph.d no fig vol"
    " jan feb mar apr aug sept oct nov dec".split()
)
#: What may stand between the mark that ends a sentence and the space after it.
_CLOSERS: Final = "\"')]}»”\u2019*"


def detect_language(text: str) -> str | None:
    """The code of a text's language (`en`, `zh-cn` ...; `unknown` where none is likely), None without any letters."""
    factory, failure = _load_detector()
    detector = factory.create()
    detector.append(text)
    try:
        return detector.detect()
    except failure:
        return None


@functools.cache
def _load_detector() -> tuple[Any, type[Exception]]:
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
        from langdetect.lang_detect_exception import LangDetectException
    except ModuleNotFoundError:
        raise missing_package("langdetect", "IFEval's check of a reply's language", "eval") from None
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory, LangDetectException


def split_sentences(text: str) -> list[str]:
    """Sentences in order: each ends in . ? or ! (with closing quotes or brackets) before white space."""
    sentences, start = [], 0
    for mark in re.finditer(rf"[.?!][{re.escape(_CLOSERS)}]*(?=\s)", text):
        if _ends_sentence(text, mark.start()):
            sentences.append(text[start : mark.end()])
            start = mark.end()
    return [sentence.strip() for sentence in (*sentences, text[start:]) if sentence.strip()]


def _ends_sentence(text: str, place: int) -> bool:
    if text[place] != ".":
        return True
    if text[place - 1 : place] == ".":  # an ellipsis goes on in lower case
        return text[place + 1 : place + 50].lstrip(_CLOSERS + " \n\t")[:1].isupper()
    word = re.split(r"[\s(\[{\"'“\u2018]", text[max(0, place - 20) : place])[-1].lower()
    return word not in _ABBREVIATIONS and not (len(word) == 1 and word.isalpha())


#: Marks around which NLTK divides words; an apostrophe at a word's end is divided between the two groups.
_FIRST_MARKS: Final = re.compile(r"[;@#$%&\u2012-\u2015?!]|\.{2,}")
_LAST_MARKS: Final = re.compile(r"[»”\u2019*\"\[\](){}<>]|''|--")
_CLITICS: Final = re.compile(r"([^' ])('[sS]|'[mM]|'[dD]|') ")
_LONG_CLITICS: Final = re.compile(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ")
_JOINED: Final = ("can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n")


def split_words(sentence: str) -> list[str]:
    """Words and marks of a sentence; contractions are divided ("don't" is "do" and "n't", "cannot" "can" and "not")."""
    text = re.sub(r"[«“\u2018„]|`+", r" \g<0> ", sentence)
    text = re.sub(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' ", text)
    text = re.sub(r"([^.])\.([\])}>\"'»”\u2019 ]*+)\s*$", r"\1 . \2 ", text)
    text = re.sub(r"[:,]$", r" \g<0> ", re.sub(r"([:,])([^\d])", r" \1 \2", text))
    text = re.sub(r"([^'])' ", r"\1 ' ", _FIRST_MARKS.sub(r" \g<0> ", text))
    text = _LAST_MARKS.sub(r" \g<0> ", text)
    text = re.sub(r"\s+", " ", f" {text} ")
    text = _LONG_CLITICS.sub(r"\1 \2 ", _CLITICS.sub(r"\1 \2 ", text))
    for pair in _JOINED:
        first, second = pair.split()
        text = re.sub(rf"(?i)\b({first})({second})\b", r" \1 \2 ", text)
    text = re.sub(r"(?i)\b(wan)(na)(?=\s)", r" \1 \2 ", text)
    return re.sub(r"(?i) ('t)(is|was)\b", r" \1 \2 ", text).split()
