"""Scores worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.scoring.metrics import (
    Constant,
    clustered_error,
    interval_iou,
    majority,
    mean,
    parse_interval_answer,
    text_matches,
    time_matches,
)


@pytest.mark.parametrize(
    ("text", "intervals"),
    [
        ("[[3.5, 7.0], [9.0, 11.5]]", [(3.5, 7.0), (9.0, 11.5)]),
        ("[[9.0, 11.5], [3.5, 7.0]]", [(3.5, 7.0), (9.0, 11.5)]),
        ("[[1.0, 4.0], [3.0, 6.0]]", [(1.0, 6.0)]),  # overlap counts once
        ("[[2, 2]]", [(2.0, 2.0)]),
        ("[]", []),
        (" []\n", []),
    ],
)
def test_well_formed_answers(text, intervals):
    assert parse_interval_answer(text) == intervals


@pytest.mark.parametrize(
    "text",
    [
        "", "never", "3.5", "[3.5, 7.0]", "[[3.5, 7.0]", "[[3.5, 7.0]] or so", "[[7.0, 3.5]]", "[[1.0]]", "[[1, 2, 3]]",
        '[["1", "2"]]', "[[true, true]]", "[[NaN, NaN]]", "[[1.0, Infinity]]", "[[-1.0, 2.0]]", "{}", "[{}]",
        "[" * 5000,
        "[[1, 1" + "0" * 400 + "]]",
    ],
)  # fmt: skip
def test_malformed_answers_are_none_and_score_nothing(text):
    assert parse_interval_answer(text) is None
    assert interval_iou(parse_interval_answer(text), [(0.0, 1.0)]) == 0.0


def test_iou_of_one_interval():
    assert interval_iou([(2.0, 6.0)], [(4.0, 8.0)]) == pytest.approx(2 / 6)


def test_iou_of_several_intervals():
    # common: 1..2 and 5..6 = 2 s; ours 4 s, theirs 4 s -> 2 / 6
    assert interval_iou([(0.0, 2.0), (4.0, 6.0)], [(1.0, 3.0), (5.0, 7.0)]) == pytest.approx(2 / 6)


def test_overlapping_predictions_count_once():
    # Counted twice, the common time would exceed the union and the score 1.
    assert interval_iou([(0.0, 4.0), (0.0, 4.0), (2.0, 5.0)], [(0.0, 5.0)]) == pytest.approx(1.0)
    assert interval_iou([(0.0, 4.0), (1.0, 3.0)], [(0.0, 8.0)]) == pytest.approx(0.5)


def test_iou_of_nothing():
    assert interval_iou([], []) == 1.0
    assert interval_iou([], [(1.0, 2.0)]) == 0.0
    assert interval_iou([(1.0, 2.0)], []) == 0.0
    assert interval_iou(None, []) == 0.0


def test_iou_of_moments():
    assert interval_iou([(3.0, 3.0)], [(3.0, 3.0)]) == 1.0
    assert interval_iou([(3.0, 3.0)], [(4.0, 4.0)]) == 0.0


_SECONDS = st.integers(0, 100).map(lambda tenths: tenths / 10)
_INTERVALS = st.lists(st.tuples(_SECONDS, _SECONDS).map(lambda pair: (min(pair), max(pair))), max_size=5)


@given(_INTERVALS, _INTERVALS)
def test_iou_is_a_symmetric_share(ours, theirs):
    score = interval_iou(ours, theirs)
    assert 0.0 <= score <= 1.0 + 1e-9
    assert score == pytest.approx(interval_iou(theirs, ours))
    assert interval_iou(ours, ours) == 1.0


def test_texts_match_but_for_case_spaces_and_a_full_stop():
    assert text_matches(" Red  circle.", "red circle")
    assert text_matches("JAZZ", "jazz")
    assert not text_matches("red circle; blue star", "red circle")
    assert not text_matches("", "none")


@pytest.mark.parametrize("reply", ["12.5 seconds", "12.5", "12.5 s", "12.50 seconds.", "12.5s"])
def test_times_match_by_their_number(reply):
    assert time_matches(reply, "12.5 seconds")


@pytest.mark.parametrize("reply", ["12.4 seconds", "at 12.5 seconds", "", "12.5 12.5", "112.5 seconds", "-12.5"])
def test_other_times_do_not_match(reply):
    assert not time_matches(reply, "12.5 seconds")


def test_majority_answer():
    assert majority(["yes", "no", "Yes"]) == Constant("yes", pytest.approx(2 / 3))
    assert majority(["b", "a"]) == Constant("a", 0.5)


def test_mean_of_nothing_is_nan():
    assert mean([1.0, 2.0]) == 1.5
    assert math.isnan(mean([]))


def test_error_of_independent_answers_is_the_usual_one():
    values = [1.0, 0.0, 0.0, 1.0]
    alone = clustered_error([list(enumerate(values))])
    assert alone == pytest.approx(math.sqrt(0.25 / 4))


def test_answers_about_one_clip_are_not_independent():
    # Two clips, each all right or all wrong: as uncertain as two answers, not four.
    assert clustered_error([[("a", 1.0), ("a", 1.0), ("b", 0.0), ("b", 0.0)]]) == pytest.approx(math.sqrt(0.25 / 2))


def test_error_of_a_mean_over_tasks():
    # Each task: p = 0.5, n = 2, variance of its mean 0.125; mean of two independent tasks: sqrt(0.25) / 2.
    first, second = [(1, 1.0), (2, 0.0)], [(3, 1.0), (4, 0.0)]
    assert clustered_error([first, second, []]) == pytest.approx(math.sqrt(2 * 0.125) / 2)
    assert math.isnan(clustered_error([[], []]))
