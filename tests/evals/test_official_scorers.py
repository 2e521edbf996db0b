"""Faults of official scorers that the golden lines don't show: what is not in their data, and what makes them raise."""

from __future__ import annotations

from typing import Any

import pytest

from keye.scoring.official.registry import find_scorer

LMMS = "lmms-eval-0.7.3"
VLMEVALKIT = "vlmevalkit-e8e78f0"
AUTHORS = "video-mme-v2-b24176a"
SCRIPT = "timelens-5d90c06"


def score(task: str, kind: str, implementation: str, document: dict[str, Any], prediction: Any = None) -> Any:
    return find_scorer(task, kind, implementation)(document, prediction)


def rows_of_group(scores: str, **changes: Any) -> list[dict[str, Any]]:
    """Records of one group of logic questions; `scores` has a digit for each, a space for a missing question."""
    row = {"video_id": "001", "group_type": "logic", "group_structure": "[1, 2, 3, 4]", "level": 1}
    row |= {"second_head": "count", "third_head": "a", **changes}
    return [
        {**row, "question_id": f"001-{number}", "score": int(digit)}
        for number, digit in enumerate(scores, 1)
        if digit != " "
    ]


def test_interval_without_length_stops_only_the_script_of_timelens() -> None:
    document = {"span": [5.0, 5.0]}
    assert score("timelens", "item", SCRIPT, document, "5 - 5")["error"] == "ZeroDivisionError"
    assert score("timelens", "item", LMMS, document, "5 - 5")["iou"] == 0.0
    assert score("timelens", "item", "timelens-train-5d90c06", document, "5 - 5")["reward"] == 0
    assert score("timelens", "aggregate", SCRIPT, {}, [(document, "5 - 5")]) == {"error": "ZeroDivisionError"}
    assert score("timelens", "aggregate", SCRIPT, {}, []) == {"error": "ZeroDivisionError"}


@pytest.mark.parametrize("implementation", [SCRIPT, LMMS])
def test_rows_of_the_same_video_query_and_span_count_once(implementation: str) -> None:
    document = {"video": "v", "query": "q", "span": [0.0, 10.0]}
    metrics = score("timelens", "aggregate", implementation, {}, [(document, "0 - 10"), (document, "20 - 30")])
    assert set(metrics["metrics"].values()) == {0.0}
    unnamed = {"span": [0.0, 10.0]}
    metrics = score("timelens", "aggregate", implementation, {}, [(unnamed, "0 - 10"), (unnamed, "20 - 30")])
    assert set(metrics["metrics"].values()) == {50.0}


def test_row_without_a_gold_interval_leaves_the_denominator_of_lmms_eval_and_stops_the_script() -> None:
    empty, full = {"span": None}, {"span": [0.0, 10.0]}
    assert score("timelens", "item", LMMS, empty, "0 - 10")["iou"] == 0.0
    assert score("timelens", "item", SCRIPT, empty, "0 - 10")["error"] == "TypeError"
    assert score("timelens", "item", "timelens-train-5d90c06", empty, "0 - 10")["error"] == "TypeError"
    items = [(empty, "0 - 10"), (full, "0 - 10")]
    assert score("timelens", "aggregate", LMMS, {}, items)["metrics"]["mIOU"] == 100.0
    assert score("timelens", "aggregate", SCRIPT, {}, items) == {"error": "TypeError"}


@pytest.mark.parametrize(
    ("task", "kind", "implementation", "document", "unit"),
    [
        ("timelens", "item", SCRIPT, {"span": [0.0, 1.0]}, "1"),
        ("keye_postprocess", "item", "keye-e472844", {}, "<answer>"),
        ("kcmmbench", "yes_no", "keye-e472844", {"answer": "是"}, "<think>"),
        ("kcmmbench", "topic_judge_reply", "keye-e472844", {"answer": "是"}, "["),
        ("mmvu", "item", LMMS, {"question_type": "open-ended", "answer": "O(n)"}, "O("),
    ],
)
def test_long_repetition_is_scored_in_linear_time(
    task: str, kind: str, implementation: str, document: dict[str, Any], unit: str
) -> None:
    # A model in a loop writes this. Patterns that start again at each repetition take minutes for it.
    assert score(task, kind, implementation, document, unit * 100_000).get("score", 0) == 0


def test_missing_question_shifts_groups_by_place_and_raises_in_groups_by_video() -> None:
    records = [*rows_of_group("111 "), *rows_of_group("0001", video_id="002")]
    by_place = score("videomme_v2", "aggregate", AUTHORS, {"records": records})["metrics"]["final_rating"]
    assert by_place["total"] == (56.25 + 0.0) / 2
    by_video = score("videomme_v2", "aggregate", LMMS, {"records": records})["metrics"]
    assert by_video["overall_score"] == (56.25 + 0.0) / 2
    records = rows_of_group("1", group_structure="[1, [2, 3], 4]")
    assert score("videomme_v2", "aggregate", LMMS, {"records": records}) == {"error": "IndexError"}
    assert score("videomme_v2", "aggregate", AUTHORS, {"records": rows_of_group("10")}) == {"error": "IndexError"}


@pytest.mark.parametrize(
    ("changes", "error"), [({"group_type": "other"}, "ValueError"), ({"group_structure": "[4, 3]"}, "ValueError")]
)
@pytest.mark.parametrize("implementation", [AUTHORS, VLMEVALKIT, LMMS, "lmms-eval-75571cf"])
def test_unknown_kind_of_group_raises(implementation: str, changes: dict[str, str], error: str) -> None:
    records = rows_of_group("1111", **changes)
    assert score("videomme_v2", "aggregate", implementation, {"records": records}) == {"error": error}


def test_level_that_some_rows_lack_raises() -> None:
    records = [*rows_of_group("1111", level=None), *rows_of_group("1111", video_id="002")]
    assert score("videomme_v2", "aggregate", AUTHORS, {"records": records}) == {"error": "ValueError"}
    assert score("videomme_v2", "aggregate", LMMS, {"records": records}) == {"error": "TypeError"}


def test_wemath_problems_with_missing_or_double_rows() -> None:
    rows = [["a", "2steps_1", 1], ["a", "2steps_2", 1], ["a", "2steps_multi", 1], ["b", "2steps_1", 1]]
    metrics = score("wemath", "aggregate", VLMEVALKIT, {"records": rows})["metrics"]
    assert metrics["n"] == 2
    assert metrics["total_counts"]["CompleteMastery_strict"] == 1
    metrics = score("wemath", "aggregate", VLMEVALKIT, {"records": [*rows, ["a", "2steps_2", 0]]})["metrics"]
    assert (metrics["n"], metrics["total_counts"]["RoteMemorization_strict"]) == (3, 1)
    assert score("wemath", "aggregate", VLMEVALKIT, {"records": rows[:1]}) == {"error": "ZeroDivisionError"}


def test_subjects_that_mmvu_does_not_know_leave_the_denominator() -> None:
    item = {"question_type": "open-ended", "answer": "7", "category": "Art"}
    metrics = score("mmvu", "aggregate", LMMS, {}, [(item, "7"), ({**item, "category": "Cooking"}, "8")])
    assert metrics["metrics"] == {"overall": 100.0}


def test_question_type_that_ocrbench_does_not_know_raises() -> None:
    item = {"question_type": "Braille", "dataset": "other", "answer": ["a"]}
    for implementation in (LMMS, VLMEVALKIT):
        assert score("ocrbench", "aggregate", implementation, {}, [(item, "a")]) == {"error": "KeyError"}


def test_chartqa_answer_that_reads_as_a_list_counts_as_several_for_vlmevalkit() -> None:
    document = {"answer": "[2007, 2008]", "type": "human_test"}
    assert score("chartqa", "item", VLMEVALKIT, document, "2008") == {"score": 1.0}
    assert score("chartqa", "item", LMMS, document, "2008") == {"score": 0.0}


def test_tempcompass_captions_without_labels_raise() -> None:
    document = {"question": "Which?\nthe ball rolls", "answer": "Sentence A: x"}
    assert score("tempcompass", "caption_matching", LMMS, document, "A") == {"error": "IndexError"}


def test_full_stops_after_the_first_32_stay() -> None:
    assert score("hallusionbench", "extract", VLMEVALKIT, {}, "yes.")["extracted"] == "Yes"
    assert score("hallusionbench", "extract", VLMEVALKIT, {}, "a. " * 32 + "yes.")["extracted"] == "Unknown"


def test_command_line_removes_thinking_before_it_scores() -> None:
    prediction = "<think>no</think>yes"
    for implementation, result in ((LMMS, None), (f"{LMMS}-cli", 1)):
        document = {"question": "?", "answer": "yes"}
        assert score("tempcompass", "yes_no", implementation, document, prediction)["score"] == result
