"""Multiple-choice questions: options in the forms in which data have them, the gold letter, the strict score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keye.errors import KeyeError, brief
from keye.evals.data.files import parse_list
from keye.evals.tables import TableTask
from keye.evals.task import ItemScore
from keye.scoring.official.registry import Document
from keye.scoring.strict.letters import find_letter

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_ONLY: Final = "Answer with the letter of the right option only."
REASON_FIRST: Final = "Think step by step, then end with 'Final Answer: <letter>'."
_MARKER: Final = re.compile(r"(?:(?<=\s)|(?<=[,;])|^)\(?([A-Z])(?:\)|[.:\uff1a\u3001])\s?")
#: Names of the columns in which tables of other programs have options and answers.
_OPTIONS: Final = ("options", "candidates", "choices")
_ANSWERS: Final = ("answer", "target", "gt_answer")


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(TableTask):
    """A task of options, scored 1 where the reply means the gold letter. A document has `options`, texts without
    letters or with them, and the gold letter as `answer` or its number as `correct_choice`."""

    def score(self, document: Document, prediction: str) -> ItemScore:
        """1 where the letter that the reply means is the gold one."""
        letter = find_letter(prediction, read_options(document.get("options") or document["choices"]))
        return ItemScore(float(letter is not None and letter == gold_letter(document)), letter)

    def adapt(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options and answers under the names of the public data, where a table has them under others."""
        adapted = dict(row)
        for names in (_OPTIONS, _ANSWERS):
            value = next((row[name] for name in names if row.get(name) not in (None, "")), None)
            for name in names:
                if value is not None and row.get(name) in (None, ""):
                    adapted[name] = value
        if not any(name in adapted for name in _OPTIONS) and (options := read_columns(row)):
            adapted |= dict.fromkeys(_OPTIONS, options)
        return adapted


def gold_letter(document: Document) -> str | None:
    """The gold letter of a document; None where it has none."""
    number = document.get("correct_choice")
    if isinstance(number, int) and not isinstance(number, bool):
        return LETTERS[number] if 0 <= number < len(LETTERS) else None
    answer = str(document.get("answer") or "").strip(" .()").upper()
    return answer if len(answer) == 1 and answer in LETTERS else None


def letter_of(answer: object, options: Sequence[str]) -> str:
    """The letter of a gold answer that is a letter, the text of an option or its number; "" where it is none of them,
    so that the question has no gold."""
    text = str("" if answer is None else answer).strip()
    bare = text.strip(" .()").upper()
    if len(bare) == 1 and bare in LETTERS[: len(options)]:
        return bare
    if text in options:
        return LETTERS[list(options).index(text)]
    return LETTERS[int(text)] if text.isdecimal() and int(text) < len(options) else ""


def read_options(value: object) -> list[str]:
    """Texts of options without their letters: of a list, an object by letters, a text that writes a list, or lines
    "A. ..."."""
    if isinstance(value, Mapping):
        value = [value[letter] for letter in LETTERS if value.get(letter) not in (None, "")]
    if isinstance(value, str) and not value.lstrip().startswith("["):
        _, options = split_options(value)
        options = options or [line.strip() for line in value.splitlines() if line.strip()]
    else:
        options = [str(option).strip() for option in parse_list(value, "options")]
    if len(options) > len(LETTERS):
        raise KeyeError(f"options are {brief(value)}: more than there are letters")
    return [_without_letter(option, letter) for option, letter in zip(options, LETTERS, strict=False)]


def read_columns(row: Mapping[str, Any]) -> list[str]:
    """Options in columns A, B, C ... of a table, up to the first that is empty."""
    options = []
    for letter in LETTERS:
        if row.get(letter) is None or str(row[letter]).strip() in ("", "nan"):
            break
        options.append(str(row[letter]).strip())
    return options


def split_options(text: str) -> tuple[str, list[str]]:
    """A question whose text holds its options ("... A. red B. blue", "(A) red (B) blue", "A: red, B: blue") as the text
    before them and the options; no options where fewer than two follow one another from A on."""
    markers = list(_MARKER.finditer(text))
    for start in reversed([index for index, marker in enumerate(markers) if marker[1] == "A"]):
        chain = [markers[start]]
        for marker in markers[start + 1 :]:
            if len(chain) < len(LETTERS) and marker[1] == LETTERS[len(chain)]:
                chain.append(marker)
        if len(chain) > 1:
            ends = [marker.start() for marker in chain[1:]] + [len(text)]
            options = [text[marker.end() : end] for marker, end in zip(chain, ends, strict=True)]
            options[-1] = options[-1].strip("\n").split("\n")[0]
            stem = re.sub(r"\s*(?:Options|Choices)\s*:?\s*$", "", text[: chain[0].start()].rstrip(" \n("))
            return stem, [option.strip().rstrip(",;").strip() for option in options]
    return text, []


def _without_letter(option: str, letter: str) -> str:
    for start in (f"{letter}. ", f"{letter}.", f"({letter}) ", f"({letter})", f"{letter}) ", f"{letter}: "):
        if option.startswith(start):
            return option[len(start) :].strip()
    return option


def list_options(options: Sequence[str]) -> str:
    """Lines "A. text"."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def ask_letter(question: str, options: Sequence[str], *, reasoning: bool = False) -> str:
    """The question with its options and the form of the answer."""
    return f"{question}\n{list_options(options)}\n{REASON_FIRST if reasoning else LETTER_ONLY}"
