"""Official scorers of MMMU and Video-MMMU: letters, and open answers as numbers and phrases."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from keye.scoring.official.longvideobench import average_subsets
from keye.scoring.official.matching import RANDOM, find_marked_letter, list_letters, strip_each
from keye.scoring.official.multiple_choice import KIT, LMMS, Items, match_choice
from keye.scoring.official.registry import Document, Fields, ItemScorer, register

_MIDDLE_LMMS: Final = "lmms-eval-75571cf"
_FAILURE: Final = "API Error"

#: What stands before an answer. Of a line, the shortest text after any of these is the answer.
_SIGNS: Final = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_VIDEO_SIGNS: Final = (
    *_SIGNS,
    *("are ", "in total ", "total ", "identify ", "recognize "),
    *("calculated as ", "counted as ", "measured as ", "observed as ", "concluded as "),
    *("found to be ", "equals ", "determined to be ", "number of ", "value is ", "adds up to ", "have ", "has "),
)
# `(?<!\d)` changes nothing that is found: it spares looking again from each digit of a long number.
_NUMBERS: Final = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Answer = float | str


@register("mmmu", "item", LMMS)
def score_item(document: Document, prediction: str) -> Fields:
    """A letter, else by chance, which is wrong here; open answers by all numbers and phrases of the reply."""
    if document["question_type"] == "multiple-choice":
        return _score_letter(document, prediction)
    answers = list_answers(prediction, _SIGNS)
    score = int(is_answer(answers, document["answer"]))
    return {"extracted": answers, "score": score, "score_full_list": score}


@register("mmmu", "item", _MIDDLE_LMMS)
def score_middle_item(document: Document, prediction: str) -> Fields:
    """As later, but an open answer is compared character by character, so that only an empty gold is ever right.

    `extracted` of an open question was whichever of a set came first, so it changes from run to run.
    """
    if document["question_type"] == "multiple-choice":
        return _score_letter(document, prediction)
    answers = list_answers(prediction, _SIGNS)
    numbers_only = all(isinstance(answer, float) for answer in answers)
    first = str(next(iter(set(answers))) if numbers_only else answers[0])
    return {
        "extracted": first,
        "score": int(is_answer(first, document["answer"])),
        "score_full_list": int(is_answer(answers, document["answer"])),
    }


@register("mmmu", "item", KIT)
def score_kit_item(document: Document, prediction: str) -> Fields:
    """VLMEvalKit's shared rule; an open question becomes a choice of its answer and "Other Answers"."""
    if document["question_type"] == "multiple-choice":
        return match_choice(document, prediction)
    return match_choice({"options": [document["answer"], "Other Answers"], "answer": "A"}, prediction)


@register("videommmu", "item", LMMS)
def score_video_item(document: Document, prediction: str) -> Fields:
    """A letter by the shared extractor; open answers as in MMMU, with more words that stand before an answer."""
    if document.get("question_type") == "multiple-choice":
        letter = find_marked_letter(prediction, list_letters(len(document["options"]))) or "No Answer Found."
        return {"extracted": letter, "score": int(_is_letter(letter, document["answer"]))}
    failed = prediction in ("", _FAILURE)
    answers: str | list[Answer] = _FAILURE if failed else list_answers(prediction, _VIDEO_SIGNS)
    return {"extracted": answers, "score": int(is_answer(answers, document["answer"]))}


def _score_letter(document: Document, prediction: str) -> Fields:
    options = document["options"]
    letter = choose_letter(prediction, dict(zip(list_letters(len(options)), options, strict=True)))
    if letter is None:
        return {"extracted": RANDOM, "score": 0, "random": True}
    return {"extracted": letter, "score": int(_is_letter(letter, document["answer"]))}


def _is_letter(letter: str, gold: str | Sequence[str]) -> bool:
    return letter == gold if isinstance(gold, str) else letter in gold


def choose_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """MMMU's own rule; None where it draws one by chance."""
    text = f" {strip_each(text, ',.!?;:' + chr(39))} "
    lowered = text.lower()
    for mark, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        present = [letter for letter in choices if mark.format(letter) in text]
        if present:
            # The mark that is looked for is not the one that places it: several may share the place -1.
            return max(present, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        present = [letter for letter, option in choices.items() if option.lower() in lowered]
        if present:
            return max(present, key=lambda letter: lowered.rfind(choices[letter].lower()))
    return None


def list_answers(text: str, signs: Sequence[str]) -> list[Answer]:
    """Numbers and lower-case phrases that a reply to an open question may mean, numbers first, each in text order."""
    text = text.strip().strip(".").lower()
    phrases = []
    lines = text.split("\n")
    for index, line in enumerate(lines):
        phrase = _cut_phrase(line, (*signs, "=") if index == len(lines) - 1 else signs)
        if phrase and phrase not in list(":,.!?;'"):
            phrases.append(phrase)
    phrases = phrases or [text]
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    answers = dict.fromkeys(answer for phrase in phrases + numbers for answer in normalise(phrase))
    return sorted(answers, key=lambda answer: (isinstance(answer, str), str(answer)))


def _cut_phrase(line: str, signs: Sequence[str]) -> str:
    shortest = ""
    for sign in signs:
        if sign in line:
            tail = line.rpartition(sign)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalise(text: str) -> list[Answer]:
    """A number to two decimals, else lower case; a single character needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_answer(answers: Sequence[Answer], gold: str | Sequence[str]) -> bool:
    """Whether a phrase contains a gold phrase or a number is a gold number."""
    texts = [gold] if isinstance(gold, str) else gold
    golds = [answer for text in texts for answer in normalise(text)]
    phrases = [answer for answer in golds if isinstance(answer, str)]
    return any(
        any(phrase in answer for phrase in phrases) if isinstance(answer, str) else answer in golds
        for answer in answers
    )


def _average(score: ItemScorer, items: Items) -> float:
    subjects = defaultdict(list)
    for item, prediction in items:
        fields = score(item, prediction)
        if fields["extracted"] != _FAILURE:
            subjects[item["subject"]].append(fields["score"])
    return average_subsets(list(subjects.values()))


@register("mmmu", "aggregate", LMMS)
def average_items(document: Document, items: Items) -> Fields:
    """Accuracy over all questions, to five digits."""
    return {"metrics": {"overall": _average(score_item, items)}, "note": "random picks counted wrong"}


@register("mmmu", "aggregate", _MIDDLE_LMMS)
def average_middle_items(document: Document, items: Items) -> Fields:
    """Accuracy over all questions, to five digits."""
    return {"metrics": {"overall": _average(score_middle_item, items)}, "note": "random picks counted wrong"}


@register("videommmu", "aggregate", LMMS)
def average_video_items(document: Document, items: Items) -> Fields:
    """Accuracy to five digits, over the replies that are not empty: failed requests leave the denominator."""
    return {"metrics": {"overall": _average(score_video_item, items)}}
