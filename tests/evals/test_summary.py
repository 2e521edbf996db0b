"""From scored answers to figures, on a handful of answers that can be counted by hand."""

import io
import json

import pytest
from rich.console import Console

from keye.evals.figures.report import print_report
from keye.evals.figures.summary import WHOLE_VIDEO, Scored, summarise


def make_answer(cluster, task, gold, correct):
    return Scored(cluster, task, "?", gold, gold if correct else "", exact=correct)


def grounded(cluster, task, iou, whole_video, gold="[[0.0, 1.0]]"):
    return Scored(cluster, task, "?", gold, "", exact=iou == 1.0, iou=iou, whole_video_iou=whole_video)


ANSWERS = [
    grounded(0, "ground", 1.0, 0.6),
    grounded(0, "ground", 0.6, 0.4, "[[0.0, 2.0]]"),
    grounded(1, "ground", 0.4, 0.2, "[[0.0, 3.0]]"),
    grounded(1, "ground_text", 0.0, 1.0),
    grounded(1, "ground_none", 1.0, 0.0, "[]"),
    grounded(2, "ground_none", 0.0, 0.0, "[]"),
    make_answer(0, "count", "2", correct=True),
    make_answer(1, "count", "3", correct=False),
    make_answer(2, "count", "3", correct=True),
    make_answer(2, "caption", "[[0.0, 1.0]] red star", correct=False),
]


def test_headline_figures():
    figures = summarise(ANSWERS)
    # ground 2 of 3 from IoU 0.5 on, ground_text 0 of 1, count 2 of 3; caption and ground_none are not shipped.
    assert figures["accuracy"] == pytest.approx(100 * (2 / 3 + 0 + 2 / 3) / 3, abs=0.01)
    assert figures["miou"] == 50.0
    assert figures["miou_with_none"] == 50.0
    assert figures["whole_video_miou"] == 55.0
    assert figures["accuracy_error"] > 0
    assert figures["miou_error"] > 0
    assert (figures["questions"], figures["clips"]) == (10, 3)


def test_grounding_levels():
    grounding = summarise(ANSWERS)["grounding"]
    assert grounding == {
        "n": 4, "r1@0.3": 75.0, "r1@0.5": 50.0, "r1@0.7": 25.0,
        "whole_video_r1@0.3": 75.0, "whole_video_r1@0.5": 50.0, "whole_video_r1@0.7": 25.0,
    }  # fmt: skip


def test_figures_of_a_task():
    tasks = summarise(ANSWERS)["tasks"]
    assert tasks["count"]["n"] == 3
    assert tasks["count"]["accuracy"] == pytest.approx(66.67)
    assert (tasks["count"]["majority_answer"], tasks["count"]["majority"]) == ("3", pytest.approx(66.67))
    assert tasks["count"]["shipped"]
    assert not tasks["caption"]["shipped"]
    assert tasks["ground"]["miou"] == pytest.approx(66.67)
    assert tasks["ground"]["exact"] == pytest.approx(33.33)
    assert "miou" not in tasks["count"]


def test_constant_answers_of_grounding():
    tasks = summarise(ANSWERS)["tasks"]
    # "[]" is right for 2 of the 5 questions of ground and ground_none; the whole video for 1 of 3 and for 0 of 2.
    assert (tasks["ground"]["majority_answer"], tasks["ground"]["majority"]) == ("[]", 40.0)
    assert (tasks["ground_none"]["majority_answer"], tasks["ground_none"]["majority"]) == ("[]", 40.0)
    assert tasks["ground_text"]["majority"] == 100.0
    alone = summarise([grounded(0, "ground", 1.0, 0.6), grounded(0, "ground", 1.0, 0.9, "[[0.0, 2.0]]")])
    assert alone["tasks"]["ground"]["majority_answer"] == WHOLE_VIDEO


def test_shipped_tasks_can_be_named():
    assert summarise(ANSWERS, shipped=("count",))["accuracy"] == pytest.approx(66.67)


def test_nothing_asked_is_none_and_json():
    figures = summarise([make_answer(0, "caption", "a", correct=True)])
    assert figures["accuracy"] is None
    assert figures["miou"] is None
    json.dumps(figures, allow_nan=False)


def test_report_shows_every_task():
    options = {"split": "test", "frames": (16, 32), "mode": "sparse", "select": "indexer", "mp4": True}
    costs = {"k_over_context": 0.1, "mean_context": 500.0, "tokens_per_second": 9.0, "seconds": 1.0}
    output = io.StringIO()
    print_report({**summarise(ANSWERS), **costs, "options": options}, Console(file=output, width=120))
    for word in ("ground_text", "(caption)", "mIoU", "50.0", "k/context 0.100", ".mp4", "[]"):
        assert word in output.getvalue()


def test_one_clip_has_no_standard_error():
    figures = summarise([make_answer(0, "count", "2", correct=True), grounded(0, "ground", 1.0, 0.6)])
    assert figures["accuracy"] == 100.0
    assert (figures["accuracy_error"], figures["miou_error"]) == (None, None)
    assert figures["tasks"]["count"]["error"] is None
    options = {"frames": [2, 2], "mode": "dense", "select": "indexer", "mp4": False, "split": "test"}
    costs = {"k_over_context": None, "seconds": 1.0, "tokens_per_second": 1.0, "mean_context": 1.0}
    console = Console(file=(shown_in := io.StringIO()), width=100)
    print_report({**figures, **costs, "options": options}, console)
    output = shown_in.getvalue()
    assert "±" not in output.replace("  ±  ", "") and "2 questions about 1 clip in 1.0 s" in output
