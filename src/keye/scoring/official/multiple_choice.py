"""Official scorers of AI2D, MMStar, RealWorldQA, Video-MME and MLVU."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from keye.scoring.official.matching import NOTHING, find_first_letter, find_marked_letter, infer_choice, list_letters
from keye.scoring.official.registry import Document, Fields, ItemScorer, register

Items = Sequence[tuple[Document, Any]]

LMMS: Final = "lmms-eval-0.7.3"
OLD_LMMS: Final = "lmms-eval-0.7.1"
KIT: Final = "vlmevalkit-e8e78f0"
#: Phrases that VLMEvalKit removes before it looks for a letter. A missing comma of the original joins two pairs of
#: them, so that neither of a pair is ever removed alone.
KIT_PHRASES: Final = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)
_MLVU_TYPES: Final = {
    "dev": "anomaly_reco count ego needle order plotQA topic_reasoning",
    "test": "anomaly_reco count ego needleQA order plotQA sportsQA topic_reasoning tutorialQA",
}


@register("ai2d", "item", LMMS)
def filter_ai2d(document: Document, prediction: str) -> Fields:
    """What lmms-eval's filter leaves; its exact-match metric compares that with the gold letter."""
    match = re.match(r"\s*([A-Z])\.", prediction)
    return {"filtered": match[1] if match else prediction}


@register("ai2d mmstar realworldqa", "item", KIT)
def match_choice(document: Document, prediction: str) -> Fields:
    """VLMEvalKit's multiple choice without a judge (policy exact_matching)."""
    options = document["options"]
    choice = infer_choice(prediction, dict(zip(list_letters(len(options)), options, strict=True))) or NOTHING
    return {"extracted": choice, "score": int(choice == document["answer"])}


@register("mmstar", "item", LMMS)
def score_mmstar(document: Document, prediction: str) -> Fields:
    """1 where the shared extractor finds the gold letter."""
    return {"score": float(find_marked_letter(prediction, "ABCD") == document["answer"].strip().upper())}


@register("mmstar", "aggregate", LMMS)
def average_mmstar(document: Document, items: Items) -> Fields:
    """The mean over sub-categories of their means: a question of a small one weighs more."""
    scores = defaultdict(list)
    for item, prediction in items:
        scores[item["l2_category"]].append(score_mmstar(item, prediction)["score"])
    if not scores:
        return {"error": "ZeroDivisionError"}
    means = [sum(values) / len(values) for values in scores.values()]
    return {"metrics": {"average": sum(means) / len(means)}}


@register("realworldqa", "item", LMMS)
def score_realworldqa(document: Document, prediction: str) -> Fields:
    """A letter by the shared extractor; any other gold must be the text without case and final full stops."""
    gold = document["answer"].strip()
    if gold.upper() in tuple("ABCD"):
        return {"score": float(find_marked_letter(prediction, "ABCD") == gold.upper())}
    return {"score": float(prediction.lower().strip().rstrip(".") == gold.lower())}


@register("videomme mlvu", "item", LMMS)
def score_four_letters(document: Document, prediction: str) -> Fields:
    """The shared extractor over A to D, though the test split of MLVU has six options."""
    return compare_letter(document, find_marked_letter(prediction, "ABCD"))


@register("videomme", "item", OLD_LMMS)
def score_old_videomme(document: Document, prediction: str) -> Fields:
    """The first capital of A to D."""
    return compare_letter(document, find_first_letter(prediction, "ABCD", KIT_PHRASES[:-2]))


@register("videomme", "item", KIT)
def score_kit_videomme(document: Document, prediction: str) -> Fields:
    """The first capital of A to D, else VLMEvalKit's shared rule over the texts of the options."""
    texts = {}
    for letter, option in zip(list_letters(len(document["options"])), document["options"], strict=True):
        if f"{letter}." in option:
            texts[letter] = option.partition(f"{letter}.")[2].strip(". \n")
    return score_first_letter(prediction, "ABCD", texts, document["answer"])


def score_first_letter(prediction: str, letters: str, texts: dict[str, str], gold: str) -> Fields:
    """VLMEvalKit's rule for long videos; `how` says which of its two ways found the letter."""
    letter, how = find_first_letter(prediction, letters, KIT_PHRASES), "regex"
    if not letter:
        letter, how = infer_choice(prediction, texts) or NOTHING, "fallback"
    return {"extracted": letter, "how": how, "score": int(letter == gold)}


@register("mlvu", "item", OLD_LMMS)
def score_old_mlvu(document: Document, prediction: str) -> Fields:
    """The character before the first closing bracket, else the whole reply."""
    return compare_letter(document, _cut_before_bracket(prediction.strip()))


@register("mlvu", "item", KIT)
def score_kit_mlvu(document: Document, prediction: str) -> Fields:
    """The character before the first closing bracket, else VLMEvalKit's shared rule."""
    choice = match_choice(document, prediction)
    return {"score": int(_cut_before_bracket(prediction) == document["answer"] or choice["score"])}


def _cut_before_bracket(text: str) -> str:
    place = text.find(")")
    return text if place < 0 else text[max(place - 1, 0) : place]


def compare_letter(document: Document, letter: str) -> Fields:
    """Fields of a letter that must equal the gold one."""
    return {"extracted": letter, "score": int(letter == document["answer"])}


def _average_videomme(score: ItemScorer, items: Items) -> Fields:
    total = sum(score(item, prediction)["score"] for item, prediction in items)
    return {"metrics": {"overall": 100 * total / len(items) if items else 0}}


def _average_mlvu(score: ItemScorer, document: Document, items: Items) -> Fields:
    """The mean over the task types of a split of their accuracies; a type without questions counts as 0."""
    scores: dict[str, list[int]] = {name: [] for name in _MLVU_TYPES[document["split"]].split()}
    for item, prediction in items:
        if item["task_type"] not in scores:
            return {"error": "KeyError"}
        scores[item["task_type"]].append(score(item, prediction)["score"])
    means = [100 * sum(values) / len(values) if values else 0 for values in scores.values()]
    return {"metrics": {"mean_over_task_types": sum(means) / len(means)}}


@register("videomme", "aggregate", LMMS)
def average_videomme(document: Document, items: Items) -> Fields:
    """Accuracy over questions, in per cent."""
    return _average_videomme(score_four_letters, items)


@register("videomme", "aggregate", OLD_LMMS)
def average_old_videomme(document: Document, items: Items) -> Fields:
    """Accuracy over questions, in per cent."""
    return _average_videomme(score_old_videomme, items)


@register("mlvu", "aggregate", LMMS)
def average_mlvu(document: Document, items: Items) -> Fields:
    """Mean over task types, in per cent."""
    return _average_mlvu(score_four_letters, document, items)


@register("mlvu", "aggregate", OLD_LMMS)
def average_old_mlvu(document: Document, items: Items) -> Fields:
    """Mean over task types, in per cent."""
    return _average_mlvu(score_old_mlvu, document, items)
