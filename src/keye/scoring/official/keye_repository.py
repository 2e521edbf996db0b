"""The Keye repository's own evaluation: KC-MMBench, and what it keeps of every reply before it is scored.

Yes and no are looked for as words between spaces: "是的" and "是。" are unknown.
"""

from __future__ import annotations

from typing import Final

from keye.scoring.official.matching import find_blocks, find_word, split_words
from keye.scoring.official.registry import Document, Fields, register

KEYE: Final = "keye-e472844"

# --- KC-MMBench ---


@register("kcmmbench", "yes_no", KEYE)
def score_kc_yes_no(document: Document, prediction: str) -> Fields:
    """The Chinese words count before the English ones."""
    text = str(prediction)
    for start, end in reversed(find_blocks(text, "<think>", "</think>")):
        text = text[:start] + text[end:]
    words = split_words(text)
    answer = find_word(words, "是", "否")
    if answer is None:
        answer = find_word(words, "yes", "no")
    extracted = "Unknown" if answer is None else "是" if answer else "否"
    score = int(extracted == document["answer"])
    return {"stripped": text, "extracted": extracted, "score": score, "judge_needed": answer is None}


@register("kcmmbench", "topic_judge_reply", KEYE)
def score_kc_topic_reply(document: Document, prediction: str) -> Fields:
    """A judge's list is right where its characters 是 and 否, also those of other words, are those of the gold."""
    lists = [line[start + 1 : end - 1] for line in prediction.split("\n") for start, end in find_blocks(line, "[", "]")]
    last = lists[-1] if lists else None
    golds = [word for word in document["answer"].split("_") if word in ("是", "否")]
    is_right = last is not None and [mark for mark in last if mark in "是否"] == golds
    return {"last_bracket": last, "score": int(is_right)}


@register("kcmmbench", "judge_reply", KEYE)
def score_kc_judge_reply(document: Document, prediction: str) -> Fields:
    return {"score": int("回答正确" in prediction)}


# --- Output ---

#: The second is what the original's second try looks for: its backslash and b became a backspace.
_BOXES: Final = ("\\boxed{", "\boxed{")


@register("keye_postprocess", "item", KEYE)
def strip_output(document: Document, prediction: str) -> Fields:
    return {"output": _strip(prediction)}


def _strip(text: str) -> str:
    text = text.rpartition("</analysis>")[2]
    _, is_closed, after = text.rpartition("</think>")
    if is_closed:
        text = after.lstrip("\n").strip()
    if "<answer>" in text:
        answers = find_blocks(text, "<answer>", "</answer>")
        if not answers:
            return text
        start, end = answers[-1]
        text = text[start:end].removeprefix("<answer>").removesuffix("</answer>")
    for box in _BOXES:
        inner = _take_box(text, box)
        if len(inner) != len(text):
            return inner
    return text


def _take_box(text: str, box: str) -> str:
    """After the last box up to its closing brace; without a box, the text up to a brace that nothing opened."""
    inner = text.rpartition(box)[2]
    depth = 1
    for place, mark in enumerate(inner):
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return inner[:place]
    return inner or text
