"""TempCompass and HallusionBench: yes and no, and exact forms of options and captions. lmms-eval and VLMEvalKit.

For TempCompass both have the same rules and a judge for the rest; they differ in what they make of a judge's reply
without a verdict. For HallusionBench lmms-eval takes "eyes" for a yes, and VLMEvalKit "**Yes**" for neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from keye.scoring.official.matching import find_word, split_words
from keye.scoring.official.registry import Document, Fields, register

LMMS: Final = "lmms-eval-0.7.3"
VLMEVALKIT: Final = "vlmevalkit-e8e78f0"
_LETTERS: Final = ("A", "B", "C", "D")
_NEEDS_JUDGE: Final[Fields] = {"score": None, "judge_needed": True}

# --- TempCompass ---


def _score(rule: Callable[[], bool | None]) -> Fields:
    """None of a rule means that it doesn't know the form of the reply."""
    try:
        is_right = rule()
    except IndexError:
        return {"error": "IndexError"}
    return dict(_NEEDS_JUDGE) if is_right is None else {"score": int(is_right), "judge_needed": False}


@register("tempcompass", "multi-choice", LMMS, VLMEVALKIT)
def score_choice(document: Document, prediction: str) -> Fields:
    return _score(lambda: _match_choice(prediction, document["answer"]))


def _match_choice(prediction: str, answer: str) -> bool | None:
    """The answer as it stands, its letter, or a reply that starts with a letter and a full stop or a bracket."""
    if prediction == answer:
        return True
    has_letter = prediction in _LETTERS or (prediction[:1] in _LETTERS and prediction[1:2] in (".", ")"))
    return prediction[0] == answer[0] if has_letter else None


@register("tempcompass", "yes_no", LMMS, VLMEVALKIT)
def score_yes_no(document: Document, prediction: str) -> Fields:
    """A reply that starts with yes or no, be it "Nothing"."""
    word = next((word for word in ("yes", "no") if prediction.lower().startswith(word)), None)
    return _score(lambda: None if word is None else word == document["answer"])


@register("tempcompass", "caption_matching", LMMS, VLMEVALKIT)
def score_caption_matching(document: Document, prediction: str) -> Fields:
    return _score(lambda: _match_caption(prediction, document["question"], document["answer"]))


def _match_caption(prediction: str, question: str, answer: str) -> bool | None:
    """An option `label: sentence` as it stands, its sentence, its label, or what its label ends with.

    The last of these forms that fits counts.
    """
    options = question.split("\n")[1:]
    pieces = [option.split(": ") for option in options]
    sentences = [piece[1] for piece in pieces]
    labels = [piece[0] for piece in pieces]
    for kind in ("Sentence ", "Option ", "Caption "):
        pieces = [[piece[0].replace(kind, "")] for piece in pieces]
    labels += [piece[0] for piece in pieces]
    form = None
    if prediction in options:
        form = prediction
    after_bracket = prediction.split(") ")[1] if ") " in prediction else prediction
    form = next((text for text in reversed(sentences) if text in (prediction, after_bracket)), form)
    form = next((text for text in reversed(labels) if text in (prediction, prediction.replace(".", ""))), form)
    if form is None:
        return None
    label = answer.split(": ")[0]
    return form in (answer, answer.split(":")[0]) or form == answer.split(": ")[1] or form == label.split()[1]


@register("tempcompass", "captioning_judge_reply", LMMS, VLMEVALKIT)
def score_captioning_reply(document: Document, prediction: str) -> Fields:
    """A judge's reply to the question about a caption: right where its last line with "Answer" has the right letter."""
    if not prediction or prediction == "invalid_request_error":
        return {"score": -1}
    lines = [line.strip() for line in prediction.split("\n")]
    answers = [line.replace("Answer:", "").strip() for line in lines if "Answer" in line]
    answer = answers[-1] if answers else prediction
    letters = sum(answer.count(f"{letter}.") for letter in _LETTERS)
    is_right = answer.split(". ")[0] == document["mc_answer"].split(". ")[0]
    return {"score": int(is_right and letters == 1)}


@register("tempcompass", "judge_reply", LMMS)
def score_lmms_judge_reply(document: Document, prediction: str) -> Fields:
    """A reply without a verdict is asked for again."""
    verdict = _find_verdict(prediction)
    return {"score": None, "retry": True} if verdict is None else {"score": int(verdict)}


@register("tempcompass", "judge_reply", VLMEVALKIT)
def score_vlmevalkit_judge_reply(document: Document, prediction: str) -> Fields:
    return {"score": int(bool(_find_verdict(prediction)))}


def _find_verdict(reply: str) -> bool | None:
    if "Correct" not in reply and "Incorrect" not in reply:
        return None
    if reply.startswith("Correct"):
        return True
    return "Incorrect" not in reply


# --- HallusionBench ---


def _find_lmms_answer(text: str) -> str:
    return "1" if "yes" in text.lower() else "0"


def _find_vlmevalkit_answer(text: str) -> str:
    answer = find_word(split_words(text.lower()), "yes", "no")
    return "Unknown" if answer is None else "Yes" if answer else "No"


@register("hallusionbench", "extract", LMMS)
def find_lmms_yes(document: Document, prediction: str) -> Fields:
    return {"extracted": _find_lmms_answer(prediction)}


@register("hallusionbench", "extract", VLMEVALKIT)
def find_vlmevalkit_yes(document: Document, prediction: str) -> Fields:
    return {"extracted": _find_vlmevalkit_answer(prediction)}


@register("hallusionbench", "aggregate", LMMS)
def score_lmms_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    """Shares from 0 to 1."""
    records = document["records"]
    if not records:
        return {"error": "ZeroDivisionError"}
    scores = [_find_lmms_answer(record["model_prediction"]) == record["gt_answer"] for record in records]
    return {"metrics": _rate(records, scores, ("category", "subcategory"))}


@register("hallusionbench", "aggregate", VLMEVALKIT)
def score_vlmevalkit_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
    """Percentages; categories aren't kept apart, only their subcategories."""
    records = document["records"]
    golds = {"1": "Yes", "0": "No"}
    scores = [
        _find_vlmevalkit_answer(str(record["model_prediction"])) == golds.get(str(record["gt_answer"]))
        for record in records
    ]
    rates = _rate(records, scores, ("subcategory",))
    return {"metrics": {name: value * 100 for name, value in rates.items()}}


def _rate(records: Sequence[Mapping[str, Any]], scores: Sequence[bool], names: Sequence[str]) -> dict[str, float]:
    """Shares of right answers, of questions and of figures whose answers are all right."""

    def share(*more: str) -> float:
        groups: dict[str, list[bool]] = defaultdict(list)
        for record, score in zip(records, scores, strict=True):
            groups["_".join(str(record[name]) for name in (*names, *more))].append(score)
        return sum(map(all, groups.values())) / len(groups) if groups else float("nan")

    overall = sum(scores) / len(scores) if scores else float("nan")
    return {"aAcc": overall, "qAcc": share("set_id", "question_id"), "fAcc": share("set_id", "figure_id")}
