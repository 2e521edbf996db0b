"""Which lines of subtitles match a question, and how that reaches frames and moments."""

from __future__ import annotations

import pytest

from keye.moments import SubtitleLine
from keye.sessions.search.subtitles import line_of, score_lines, score_times, words_of

TEXTS = (
    "Good evening and welcome", "The mayor opens the red folder", "A red car", "the folder", "We vote on the budget",
    "市长打开红色文件夹", "Un café, please", "it is red", "the meeting is closed", "the end",
)  # fmt: skip
LINES = [SubtitleLine(10.0 * i, 10.0 * i + 3, text) for i, text in enumerate(TEXTS)]


def best(query: str) -> str | None:
    matches = score_lines(LINES, query)
    return matches[0][0].text if matches else None


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("when does someone open the red folder?", "The mayor opens the red folder"),
        ("RED FOLDER", "The mayor opens the red folder"),
        ("红色文件夹", "市长打开红色文件夹"),
        ("什么时候打开文件夹", "市长打开红色文件夹"),
        ("cafe", "Un café, please"),
        ("the", None),
        ("", None),
        ("a horse jumps over a fence", None),
    ],
)
def test_the_best_line_is_the_one_that_says_it(query: str, text: str | None) -> None:
    assert best(query) == text


def test_order_and_rare_words_count() -> None:
    scores = {line.text: score for line, score in score_lines(LINES, "red folder")}
    assert scores["The mayor opens the red folder"] == 1.0
    assert scores["the folder"] > scores["A red car"], "fewer lines speak of folders"
    assert score_lines([], "red") == [] and list(scores.values()) == sorted(scores.values(), reverse=True)


def test_scores_reach_the_frames_around_a_line() -> None:
    matches = score_lines(LINES, "budget")
    times = [float(t) for t in range(30, 60)]
    scores = score_times(matches, times)
    assert [t for t, score in zip(times, scores, strict=True) if score] == list(range(38, 45))
    match = line_of(matches, 46.0, 50.0, around=4.0)
    assert match is not None and match.text == "We vote on the budget" and line_of(matches, 60, 61) is None


def test_words_of_scripts_without_spaces_are_pairs() -> None:
    assert words_of("Ann's Café 红色文") == ["ann", "cafe", "红色", "色文"]
