"""Scores of searches on cases worked out by hand."""

import json
import math

import numpy as np
import pytest

from keye.evals.figures.searches import SearchRow, summarise_searches
from keye.moments import Coverage, FindResult, Moment
from keye.scoring.calibration import fit_logistic
from keye.scoring.search import (
    best_spans,
    calibration_error,
    first_iou,
    is_hit,
    one_pass_ceiling,
    overlaps,
    pick_threshold,
    random_span_recall,
)

GOLD = (100.0, 102.0)


def test_a_hit_is_a_moment_whose_middle_is_within_five_seconds():
    assert is_hit([(95.0, 95.5)], GOLD, 1)
    assert not is_hit([(94.0, 95.5)], GOLD, 1)
    assert is_hit([(0.0, 1.0), (107.0, 107.0)], GOLD, 2)
    assert not is_hit([(0.0, 1.0), (107.0, 107.0)], GOLD, 1)
    assert not is_hit([], GOLD, 5)


def test_an_interval_over_the_whole_film_is_no_hit():
    assert not is_hit([(0.0, 7200.0)], GOLD, 1)


def test_the_first_moment_counts_and_none_scores_nothing():
    assert first_iou([(101.0, 103.0), GOLD], GOLD) == pytest.approx(1 / 3)
    assert first_iou([], GOLD) == 0.0


@pytest.mark.parametrize(
    ("spacing", "seen", "miou", "recall"),
    [(9.4, 0.213, 0.045, 0.0), (2.5, 0.80, 0.505, 0.60), (1.0, 1.0, 0.785, 1.0), (0.25, 1.0, 0.94, 1.0)],
)
def test_what_a_perfect_model_reaches_in_one_pass(spacing, seen, miou, recall):
    ceiling = one_pass_ceiling(2.0, spacing)
    assert ceiling.seen == pytest.approx(seen, abs=1e-3)
    assert ceiling.miou == pytest.approx(miou, abs=1e-3)
    assert ceiling.recall == pytest.approx(recall, abs=1e-3)


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    # Bin 0.9 to 1: two of four right at 0.95; bin 0.1 to 0.2: none of one at 0.15.
    chances, outcomes = [0.95, 0.95, 0.95, 0.95, 0.15], [True, True, False, False, False]
    assert calibration_error(chances, outcomes) == pytest.approx((4 * 0.45 + 1 * 0.15) / 5)
    assert calibration_error([1.0, 0.0], [True, False]) == 0.0
    assert math.isnan(calibration_error([], []))


def test_best_spans_keep_their_distance():
    times, scores = np.arange(100.0), np.zeros(100)
    scores[[20, 22, 60]] = 3.0, 2.0, 1.0
    assert best_spans(times, scores, 2, 12.0) == [(14.0, 26.0), (54.0, 66.0)]
    assert len(best_spans(times, scores, 50, 12.0)) <= 9
    assert best_spans(times, np.full(100, -np.inf), 3, 12.0) == []


def test_overlap_needs_common_time():
    assert overlaps([(0.0, 1.0), (101.9, 110.0)], GOLD)
    assert not overlaps([(90.0, 100.0), (102.0, 103.0)], GOLD)


def test_random_spans():
    assert random_span_recall(7200.0, 2.0, 8, 12.0) == pytest.approx(8 * 14 / 7200)
    assert random_span_recall(10.0, 2.0, 8, 12.0) == 1.0


def test_the_threshold_keeps_nine_of_ten_events_with_the_fewest_false_alarms():
    present = [0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.8, 0.1]
    threshold = pick_threshold(present, [0.7, 0.05], recall=0.9)
    assert threshold == pytest.approx(0.75)
    assert sum(value >= threshold for value in present) == 9
    assert pick_threshold([0.5], [0.6], recall=0.9) == 0.5


def test_a_logistic_model_recovers_the_odds():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 2))
    outcomes = rng.random(4000) < 1 / (1 + np.exp(-(0.5 + 2 * rows[:, 0])))
    fit = fit_logistic(rows.tolist(), outcomes.tolist())
    assert fit.bias == pytest.approx(0.5, abs=0.12)
    assert fit.weights == pytest.approx((2.0, 0.0), abs=0.15)
    chances = [fit.probability(row) for row in rows]
    assert calibration_error(chances, outcomes.tolist()) < 0.03


def test_rows_that_a_feature_parts_leave_probabilities_off_the_ends():
    fit = fit_logistic([[-8.0], [-7.0], [7.0], [8.0]], [False, False, True, True], penalty=0.1)
    assert 0.5 < fit.probability([7.5]) < 0.99
    assert fit.probability([-7.5]) == pytest.approx(1 - fit.probability([7.5]), abs=0.05)


def test_outcomes_of_one_kind_and_constant_features():
    fit = fit_logistic([[1.0], [1.0], [1.0]], [True, True, True])
    assert fit.probability([1.0]) == pytest.approx(4 / 5, abs=1e-3)


def row(film, gold, ranked, above, presence, **others):
    values = {"query_tokens": 1000, "index_tokens": 10_000, "wall": 2.0, "cpu": 1.0, "stages": {}, "is_first": False}
    chances = tuple(0.9 for _ in ranked)
    return SearchRow(film, "red circle", gold, tuple(ranked), chances, above, presence, **{**values, **others})


ROWS = [
    row(0, GOLD, [GOLD], 1, 0.9, is_first=True, wall=60.0),
    row(0, GOLD, [(0.0, 2.0), GOLD], 1, 0.9),
    row(1, GOLD, [(101.0, 103.0)], 0, 0.3),
    row(1, GOLD, [], 0, 0.1, query_tokens=3000),
    row(0, None, [(5.0, 6.0)], 1, 0.7),
    row(1, None, [], 0, 0.1, wall=4.0),
]


def test_figures_of_a_run():
    result = summarise_searches(ROWS)
    assert result["films"] == 2
    present = result["present"]
    assert present["n"] == 4
    assert present["hit@1"]["value"] == 50.0
    assert present["hit@5"]["value"] == 75.0
    assert present["r1@0.3"]["value"] == 50.0
    assert present["r1@0.5"]["value"] == 25.0
    assert present["miou"]["value"] == pytest.approx(100 * (1 + 1 / 3) / 4, abs=0.01)
    assert present["answered"]["value"] == 50.0
    assert present["answered_miou"]["value"] == 25.0
    assert result["absent"]["n"] == 2
    assert result["absent"]["false_alarms"]["value"] == 50.0
    assert result["absent"]["false_alarms_at_recall"]["value"] == 100.0  # 90 % of four are all four
    costs = result["costs"]
    assert costs["query_tokens"] == {"median": 1000.0, "most": 3000}
    assert costs["most_query_share"] == 0.3
    assert costs["first"]["wall"] == 60.0
    assert costs["further"]["n"] == 5
    assert costs["further"]["most_wall"] == 4.0


def test_errors_have_films_as_clusters():
    # hit@1 by film: 1 of 2 and 1 of 2; r1@0.5: 1 of 2 and 0 of 2.
    figures = summarise_searches(ROWS)["present"]
    assert figures["hit@1"]["error"] == 0.0
    assert figures["r1@0.5"]["error"] == pytest.approx(100 * math.sqrt(2 * (0.5 / 4) ** 2), abs=0.01)
    assert summarise_searches(ROWS[:2])["present"]["hit@1"]["error"] is None


def test_calibration_of_presence_and_of_the_first_moment():
    calibration = summarise_searches(ROWS)["calibration"]
    assert calibration["presence"]["n"] == 6
    assert calibration["presence"]["error"] == pytest.approx((2 * 0.1 + 0.7 + 0.7 + abs(1 - 0.2)) / 6, abs=1e-4)
    assert calibration["chance"]["n"] == 4
    assert calibration["chance"]["error"] == pytest.approx(0.9 - 0.25)


def test_rows_survive_json():
    for item in ROWS:
        assert SearchRow.from_dict(json.loads(json.dumps(item.to_dict()))) == item


def test_the_row_of_a_result_has_weaker_moments_behind_the_others():
    moments = [Moment("a", 1, 1.0, 2.0, 0.9), Moment("b", 2, 5.0, 6.0, 0.2)]
    coverage = Coverage(10.0, (), (), 1, 20, 400, 50)
    result = FindResult("x", "v", "m", (moments[0],), (moments[1],), 0.8, 0.5, coverage, (), {"close": 1.0})
    item = SearchRow.of(3, "x", (1.0, 2.0), result, wall=1.0, cpu=0.5, is_first=True)
    assert item.ranked == ((1.0, 2.0), (5.0, 6.0))
    assert item.above == 1
    assert item.iou == 1.0
    assert (item.query_tokens, item.index_tokens, item.film) == (50, 400, 3)


def test_a_run_without_probabilities_and_an_empty_one():
    rows = [row(0, GOLD, [GOLD], 1, None), row(0, None, [], 0, None)]
    assert summarise_searches(rows)["absent"]["false_alarms_at_recall"] is None
    assert summarise_searches(rows)["calibration"]["presence"]["error"] is None
    assert summarise_searches([])["present"]["miou"]["value"] is None
