"""How a model is asked about an event: when it happens, and whether it does; and what its reply says.

Knows the wording that each model was trained on and no frames.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from keye.config import GenerationConfig
from keye.errors import KeyeError

if TYPE_CHECKING:
    from keye.engine.request import TokenProb

#: Characters of an event: a sentence or two.
MOST_CHARACTERS: Final = 500
_WORD: Final = re.compile(r"(?:(?:the |a )?(?:word|text) )?[\"']?([A-Z0-9]{2,20})[\"']?")
_ARTICLES: Final = ("the ", "a ", "an ")
#: Least probability that yes and no share where a reply counts as one of them.
LEAST_MASS: Final = 0.05
#: Log-odds are kept within this of 0: a probability of 1 says no more than one of 0.9999.
MOST_LOG_ODDS: Final = 12.0


def ground_question(config: GenerationConfig, event: str) -> str:
    """The question when `event` happens. `KeyeError` for an empty event and for one that is as long as a text."""
    word = _word_of(event)
    if word is not None and config.word_ground_prompt is not None:
        return config.word_ground_prompt.format(word=word)
    return _fill(config.ground_prompt, event, article="the")


def presence_question(config: GenerationConfig, event: str) -> str:
    """The question, to be answered with yes or no, whether `event` happens. Errors as in `ground_question`."""
    word = _word_of(event)
    if word is not None and config.word_presence_prompt is not None:
        return config.word_presence_prompt.format(word=word)
    return _fill(config.presence_prompt, event, article=None)


def check_event(event: object) -> str:
    """An event without spaces around it; `KeyeError` for anything else."""
    subject = " ".join(event.split()) if isinstance(event, str) else ""
    if not subject:
        raise KeyeError("the event is empty; say what to look for, e.g. 'the red circle'")
    if len(subject) > MOST_CHARACTERS:
        raise KeyeError(f"the event has {len(subject):,} characters, more than {MOST_CHARACTERS}; say it in a sentence")
    return subject


def _word_of(event: str) -> str | None:
    """The word in "the word STOP" or "STOP": text in the picture, in capital letters."""
    match = _WORD.fullmatch(check_event(event))
    return None if match is None else match[1]


def _fill(prompt: str, event: str, *, article: str | None) -> str:
    subject = check_event(event)
    if "{article}" in prompt and subject.lower().startswith(_ARTICLES):
        subject = subject.split(" ", 1)[1]
    indefinite = "an" if subject[0].lower() in "aeiou" else "a"
    return prompt.format(event=subject, article=article or indefinite)


def yes_log_odds(probs: Sequence[TokenProb]) -> float | None:
    """The log-odds of yes against no in the first token of a reply, by the likeliest tokens there; None where the model
    means to write something else."""
    if not probs:
        return None
    likeliest = {other.token: other for other in (*probs[0].top, probs[0])}.values()
    mass = {
        word: sum(math.exp(other.logprob) for other in likeliest if other.text.strip().lower() == word)
        for word in ("yes", "no")
    }
    if sum(mass.values()) < LEAST_MASS:
        return None
    least = math.exp(-MOST_LOG_ODDS)
    return clip_log_odds(math.log(max(mass["yes"], least) / max(mass["no"], least)))


def clip_log_odds(value: float) -> float:
    """Log-odds within `MOST_LOG_ODDS` of 0."""
    return max(-MOST_LOG_ODDS, min(MOST_LOG_ODDS, value))


def to_probability(log_odds: float) -> float:
    """The probability of log-odds."""
    return 1 / (1 + math.exp(-log_odds))
