"""Replies that repeat themselves without end: a model that has lost the thread, not one that lists much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: A reply is looked at after each so many tokens.
EVERY: Final = 16
#: How often its last part must have been repeated, and how long all repetitions must be, in tokens: half of what may be
#: written, within these bounds.
_TIMES: Final = 8
_LEAST: Final = 48
_MOST: Final = 256
#: The longer end of a reply that is searched for long repetitions, in lengths of the shorter.
_LONGER: Final = 4


def is_loop(reply: Sequence[int], max_tokens: int) -> bool:
    """Whether a reply of token ids ends in a part that was repeated at least 8 times in a row.

    Short parts (words, times, a sentence) count once the repetitions fill `max_tokens` / 2, at least 48 and at most 256
    tokens; longer parts once they fill four times that. Looked at every 16 tokens; linear in those numbers.
    """
    if len(reply) % EVERY:
        return False
    length = min(max(_LEAST, max_tokens // 2), _MOST)
    return any(len(reply) >= n and _period(reply[-n:]) * _TIMES <= n for n in (length, _LONGER * length))


def _period(tokens: Sequence[int]) -> int:
    """The shortest part of which `tokens` is a repetition, the last one cut perhaps (Knuth, Morris and Pratt)."""
    borders = [0] * len(tokens)
    border = 0
    for i in range(1, len(tokens)):
        while border and tokens[i] != tokens[border]:
            border = borders[border - 1]
        border += tokens[i] == tokens[border]
        borders[i] = border
    return len(tokens) - border
