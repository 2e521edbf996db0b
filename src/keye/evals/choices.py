"""Multiple-choice questions: letters before options, the gold letter, and their strict score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keye.errors import KeyeError, brief
from keye.evals.files import parse_list
from keye.evals.tables import TableTask
from keye.evals.task import ItemScore
from keye.scoring.official.registry import Document
from keye.scoring.strict.letters import find_letter

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_ONLY = "Answer with the letter of the right option only."
REASON_FIRST = "Think step by step, then end with 'Final Answer: <letter>'."


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(TableTask):
    """A task of options, scored 1 where the reply means the gold letter. A document has `options`, texts without
    letters or with them, and the gold letter as `answer`."""

    def score(self, document: Document, prediction: str) -> ItemScore:
        """1 where the letter that the reply means is the gold one."""
        letter = find_letter(prediction, plain_options(document["options"]))
        gold = gold_letter(document)
        return ItemScore(float(letter is not None and letter == gold), letter)


def gold_letter(document: Document) -> str | None:
    """The gold letter of a document; None where it has none."""
    if isinstance(document.get("correct_choice"), int) and document["correct_choice"] >= 0:
        return LETTERS[document["correct_choice"]]
    answer = str(document.get("answer") or "").strip()
    return answer.upper() if len(answer) == 1 and answer.upper() in LETTERS else None


def plain_options(value: object) -> list[str]:
    """Texts of options without their letters: of a list, of a text that writes a list, or of lines "A. ..."."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        options = [line.strip() for line in value.splitlines() if line.strip()]
    else:
        options = [str(option).strip() for option in parse_list(value, "options")]
    if len(options) > len(LETTERS):
        raise KeyeError(f"options are {brief(value)}: more than there are letters")
    return [_without_letter(option, letter) for option, letter in zip(options, LETTERS, strict=False)]


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
