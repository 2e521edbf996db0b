"""What is said: lines of subtitles matched to a question, as scores beside those of the picture.

A text score that needs no model. Words count once, by how rare they are among the lines (the inverse document frequency
of BM25), without stemming; Chinese and Japanese, which part no words, count by pairs of characters. Of a line's score
`_PHRASE` is for words that follow one another there as in the question.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.moments import SubtitleLine

#: The part of a score that order gives, and the least score of a match.
_PHRASE: Final = 0.25
LEAST: Final = 0.3
#: Seconds around a line in which what it speaks of may be seen.
AROUND: Final = 2.0
#: Most characters of a question that are looked at.
_MOST_QUERY: Final = 1000

#: Scripts that are written without spaces: kana, Chinese characters, and their extensions.
_UNSPACED: Final = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_RUN: Final = re.compile(rf"[{_UNSPACED}]+|[^\W_{_UNSPACED}]+(?:'[^\W\d_{_UNSPACED}]+)?")
_IS_UNSPACED: Final = re.compile(rf"[{_UNSPACED}]")
#: Words of questions that say nothing of what is looked for.
_EMPTY: Final = frozenset(
    "a an and are as at be been by did do does for from has have he her him his how i in is it its me my of on or our "
    "she so than that the their them then there they this to up us was we were what when where which who will with you "
    "your find show moment 的 了 是 在 吗 么 呢 和 有 什么 时候 哪里".split()
)


def words_of(text: str) -> list[str]:
    """The words of a text in order, in one form for capital and small letters, with and without accents."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold())
    plain = unicodedata.normalize("NFC", "".join(c for c in plain if not _is_accent(c)))
    words: list[str] = []
    for run in _RUN.findall(plain):
        if _IS_UNSPACED.match(run) and len(run) > 1:
            words += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            words.append(run.removesuffix("'s"))
    return words


def score_lines(lines: Sequence[SubtitleLine], query: str) -> list[tuple[SubtitleLine, float]]:
    """The lines that match a question with their scores, from `LEAST` to 1, the best first.

    1: all words of the question stand in the line, in its order. Words that no line has count, so that a question of
    which only a common word is said matches nothing.
    """
    wanted_words = [word for word in words_of(query[:_MOST_QUERY]) if word not in _EMPTY]
    if not wanted_words or not lines:
        return []
    spoken = [words_of(line.text) for line in lines]
    wanted = set(wanted_words)
    counts = Counter(word for words in spoken for word in wanted.intersection(words))
    weights = {word: math.log(1 + (len(lines) - counts[word] + 0.5) / (counts[word] + 0.5)) for word in wanted}
    total, pairs = sum(weights.values()), set(pairwise(wanted_words))
    matches = []
    for line, words in zip(lines, spoken, strict=True):
        present = wanted.intersection(words)
        if not present:
            continue
        share = sum(weights[word] for word in present) / total
        content = [word for word in words if word not in _EMPTY]
        follows = pairs.intersection(pairwise(content))
        order = len(follows) / len(pairs) if pairs else share
        score = (1 - _PHRASE) * share + _PHRASE * order
        if score >= LEAST:
            matches.append((line, round(score, 4)))
    return sorted(matches, key=lambda match: (-match[1], match[0].start))


def score_times(matches: Sequence[tuple[SubtitleLine, float]], times: Sequence[float]) -> NDArray[np.float32]:
    """For each of ascending `times` (seconds) the best score of a matching line shown within `AROUND` of it; 0 where
    there is none. float32 [times]."""
    scores = np.zeros(len(times), np.float32)
    at = np.asarray(times, np.float64)
    for line, score in matches:
        first, end = np.searchsorted(at, [line.start - AROUND, line.end + AROUND])
        np.maximum(scores[first:end], score, out=scores[first:end])
    return scores


def line_of(
    matches: Sequence[tuple[SubtitleLine, float]], start: float, end: float, around: float = AROUND
) -> SubtitleLine | None:
    """The best matching line that is shown within `around` seconds of start..end; None where there is none."""
    near = (line for line, _ in matches if line.end >= start - around and line.start <= end + around)
    return next(near, None)


def _is_accent(character: str) -> bool:
    """Whether this is a mark over a letter, as é has one; those of scripts that need them stay."""
    return "\u0300" <= character <= "\u036f"
