"""Ways of official scorers to find a letter or to cut thinking out of a reply, shared by several benchmarks.

Each is reproduced as it is, faults included: nothing here is a good way to read a reply. `keye.scoring.strict` is ours.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Final

#: What these scorers say where they would draw an option by chance. No draw is made here; it is never right.
RANDOM: Final = "<RANDOM>"
#: What VLMEvalKit says where nothing was answered and no judge may be called.
NOTHING: Final = "Z"

_TAGS: Final = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
_NOUNS: Final = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES: Final = (
    *(f"{article}{noun} is" for noun in _NOUNS for article in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_MARKS: Final = ("({})", "{}.", "{}:", "{})", "{} ", "{}")

_REFUSALS: Final = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SPACES: Final = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Only the first four letters are read from a sentence, however many options there are.
_SENTENCE: Final = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def remove_reasoning(text: str) -> str:
    """Cuts closed <think> and <analysis> blocks, as lmms-eval's command line does before it scores.

    An unclosed block stays. Of a text with only the closing tag, what follows the last one stays.
    """
    for opening, closing in _TAGS:
        while (start := text.find(opening)) >= 0 and (end := text.find(closing, start)) >= 0:
            text = text[:start] + text[end + len(closing) :]
        if opening not in text and closing in text:
            text = text.rpartition(closing)[2]
    return text.strip()


def list_letters(count: int) -> list[str]:
    """The letters of `count` options."""
    return [chr(ord("A") + index) for index in range(count)]


def find_marked_letter(text: str, letters: Sequence[str]) -> str:
    """lmms-eval's shared extractor: the letter whose mark counts most, of equal marks the last; "" where none is."""
    letters = letters or string.ascii_uppercase[:8]
    text = strip_each(text.strip(), ",.!?;:'\"")
    core = text.strip()
    for edge, neighbour in ((core[:1], core[1:2]), (core[-1:], core[-2:-1])):
        if edge in letters and edge and not neighbour.isalpha():
            return edge
    text = f" {text} "
    lowered = text.lower()
    positions = {}
    for phrase in _PHRASES:
        if (start := lowered.find(phrase)) >= 0:
            for letter in letters:
                # The place in the lowered text is used for the text itself, though lowering can change its length.
                positions[text.find(letter, start + len(phrase))] = letter
    if positions and (last := max(positions)) >= 0:
        return positions[last]
    for mark in _MARKS:
        places = {text.rfind(mark.format(letter)): letter for letter in letters}
        if (last := max(places)) >= 0:
            return places[last]
    return ""


def find_first_letter(text: str, letters: str, phrases: Sequence[str]) -> str:
    """The first of the letters once some phrases are removed: "Based on ..." is B. "" where there is none."""
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    match = re.search(f"[{letters}]", text)
    return match[0] if match else ""


def infer_choice(text: str, choices: Mapping[str, object]) -> str | None:
    """VLMEvalKit's can_infer without a judge, as its environment variable VERBOSE is unset.

    The letter that alone stands near the end, else that of "answer is X", else the only option whose text is there.
    """
    letter = _infer_letter(text, choices)
    if letter is not None:
        return letter
    texts = {key: str(choice).lower() for key, choice in choices.items()}
    lowered = text.lower()
    if len(lowered) > 2 * sum(len(str(choice)) for choice in choices.values()):
        return None
    present = [key for key, choice in texts.items() if choice in lowered]
    return present[0] if len(present) == 1 else None


def _infer_letter(text: str, choices: Mapping[str, object]) -> str | None:
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return NOTHING
    words = text.translate(_SPACES).split()
    standing = [letter for letter in choices if letter in words]
    if len(standing) == 1 and words.index(standing[0]) > len(words) - 5:
        return standing[0]
    if not standing and NOTHING in words:
        return NOTHING
    match = _SENTENCE.search(text)
    return match[1].upper() if match and match[1].upper() in choices else None


def strip_each(text: str, characters: str) -> str:
    """Strips one character after the other, each only once: "a.,." keeps its inner full stop."""
    for character in characters:
        text = text.strip(character)
    return text


_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_OF_NUMBER: Final = re.compile(r"\d,\d")
_FULL_STOP: Final = re.compile(r"\.(?!\d)")
#: The original passes a flag where the number of replacements belongs: so many full stops go, no more.
_MAX_FULL_STOPS: Final = int(re.UNICODE)


def find_blocks(text: str, opening: str, closing: str) -> list[tuple[int, int]]:
    """Places of what the pattern `opening.*?closing` matches, dots being any character; in linear time."""
    blocks = []
    end = 0
    while (start := text.find(opening, end)) >= 0 and (stop := text.find(closing, start + len(opening))) >= 0:
        end = stop + len(closing)
        blocks.append((start, end))
    return blocks


def split_words(text: str) -> list[str]:
    """Words without marks: a mark next to a space is deleted, any other divides."""
    deletes_all = _COMMA_OF_NUMBER.search(text) is not None
    words = text
    for mark in _PUNCTUATION:
        is_deleted = deletes_all or f"{mark} " in text or f" {mark}" in text
        words = words.replace(mark, "" if is_deleted else " ")
    return _FULL_STOP.sub("", words, count=_MAX_FULL_STOPS).split()


def find_word(words: Sequence[str], yes: str, no: str) -> bool | None:
    """Whether the yes is there without the no; None where both or neither are."""
    return yes in words if (yes in words) != (no in words) else None
