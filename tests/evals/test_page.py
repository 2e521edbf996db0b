"""The report of evaluations: every figure beside what it depends on, nothing loaded, nothing hidden."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from keye.evals.faults import FAULTS, find_fault
from keye.evals.published import DIMENSIONS, PUBLISHED, find_published
from keye.evals.results.page import build_report


def figures(value: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "metric": "mIoU", "value": value, "lower_bound": value or 12.0,
        "interval": None if value is None else [40.0, 60.0],
        "n": 200, "unparsed": 0.05, "random": 0.25, "random_expected": 3.125, "judge_needed": 0.0,
        "parts": {"duration": {"short": 61.0, "long": 33.5}}, "notes": [], **changes,
    }  # fmt: skip


def result(**changes: Any) -> dict[str, Any]:
    return {
        "format": "keye-eval-1", "task": "timelens_charades", "title": "TimeLens: Charades", "metric": "mIoU",
        "dimension": "Video", "model": {"name": "nano <1>", "server": None},
        "settings": {"limit": None, "media": {"fps": 4}, "sampling": {}, "thinking": None, "attention": "sparse"},
        "items": 200, "clusters": 50, "complete": True, "withheld": None,
        "scorers": {"strict": figures(50.0), "timelens-eval": figures(44.5)},
        "shares": {"failed": 0.0, "missing": 0.0, "unparsed": 0.05, "judged": 0.0},
        "errors": [], "frames": {"mean": 118.4, "p50": 116, "max": 240},
        "tokens": {"prompt": {"mean": 4321.0, "p50": 4000, "max": 9000}, "reply": None},
        "digests": {"prompts": "aa11", "data": "bb22", "plans": None, "weights": "cc33", "scorers": "dd44"},
        "seconds": 12.5, "items_per_second": 16.0, **changes,
    }  # fmt: skip


def report_of(folder: Path, *results: dict[str, Any], **more: Any) -> str:
    build_report(results, folder / "report.html", **more)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_scorer_stands_with_its_interval_shares_and_digests(tmp_path: Path) -> None:
    html = report_of(tmp_path, result())
    for text in ("50.0 [40.0, 60.0]", "44.5 [40.0, 60.0]", "5.0 %", "25.0 %", "3.12", "aa11", "bb22", "cc33", "dd44",
                 "mean 118.4", "mean 4,321.0", "By duration", "33.5", "fps 4", "attention sparse",
                 "200 about 50 media"):  # fmt: skip
        assert text in html, text
    assert html.count("<svg") == 1


def test_official_aggregations_stand_beside_the_headline(tmp_path: Path) -> None:
    html = report_of(tmp_path, result(scorers={"vlmevalkit": figures(50.0, official={"Overall (strict)": 0.4321})}))
    assert "Overall (strict)" in html and "0.43" in html and "official aggregations" in html
    assert "official aggregations" not in report_of(tmp_path, result())


def test_published_scores_stand_beside_ours_and_are_marked(tmp_path: Path) -> None:
    html = report_of(tmp_path, result())
    assert "58.4" in html and "arXiv 2606.10651" in html and "Theirs: published scores" in html
    assert 'class="series-5 theirs"' in html
    assert "Theirs: published scores" not in report_of(tmp_path, result(task="somebody_s_own"))


def test_the_report_loads_nothing_and_shows_texts_as_they_are(tmp_path: Path) -> None:
    html = report_of(tmp_path, result(title="<script>alert(1)</script>", errors=[{"count": 2, "message": "<b>x</b>"}]))
    assert "<script" not in html and "<b>x" not in html and "nano &lt;1&gt;" in html
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", html)
    assert "default-src 'none'" in html


def test_a_score_never_hides_failed_items(tmp_path: Path) -> None:
    lost = result(
        withheld="of 200 items 60 failed: run the same command again", stopped="no worker is left",
        shares={"failed": 0.3, "missing": 0.1, "unparsed": 0.0, "judged": 0.0}, scorers={"strict": figures(None)},
    )  # fmt: skip
    html = report_of(tmp_path, lost)
    assert "60 failed" in html and "20 missing of 200 items; they count as wrong" in html
    assert "no worker is left" in html and "withheld (at least 12.0)" in html and "40.0 %" in html
    assert html.index('class="warning"') < html.index("<h2>")


def test_the_seven_dimensions_are_all_there(tmp_path: Path) -> None:
    html = report_of(tmp_path, result(), result(task="mlvu", scorers={"strict": figures(70.0)}))
    rows = dict(re.findall(r'<tr><th scope=row>([^<]+)</th><td class="number">([^<]+)</td>', html))
    assert rows["Video"] == "57.2"  # 44.5 by the official scorer and 70.0 by strict, which has no other
    assert all(rows[name.replace("&", "&amp;")] == "-" for name in DIMENSIONS[1:])


def test_results_of_one_scorer_without_figures_make_a_report(tmp_path: Path) -> None:
    assert "<h1>Evaluation</h1>" in report_of(tmp_path)
    bare = {"task": "own", "scorers": {}, "items": 0}
    assert "own" in report_of(tmp_path, bare)
    none = result(scorers={"strict": figures(None, lower_bound=None)}, frames=None, tokens={}, digests={})
    assert "Scores with intervals" not in report_of(tmp_path, none)


def test_a_paired_comparison_is_shown_with_its_verdict(tmp_path: Path) -> None:
    pair = {"first": 50.0, "second": 49.5, "difference": -0.5, "interval": [-1.25, 0.25], "first_better": 3,
            "second_better": 1, "equal": 196}  # fmt: skip
    comparison = {
        "task": "mlvu", "first": {"name": "nano"}, "second": {"name": "nano"}, "items": 200, "same_replies": 0.9,
        "scorers": {"strict": pair, "other": {**pair, "interval": None}}, "kind": "sparse against dense attention",
        "frames": 64, "margin": 1.0, "verdict": "undecided",
    }  # fmt: skip
    html = report_of(tmp_path, result(), comparisons=[comparison])
    for text in ("-0.50 [-1.25, +0.25]", "no interval", "sparse against dense attention, at most 64 frames",
                 "90.0 % of the replies", "margin of 1 points: undecided", "200 items in pairs"):  # fmt: skip
        assert text in html, text


def test_published_figures_are_scores_with_a_source() -> None:
    assert all(0 <= entry.value <= 100 and entry.source and entry.model for entry in PUBLISHED)
    assert len(set(PUBLISHED)) == len(PUBLISHED)
    values = {
        (entry.model, entry.settings): entry.value
        for entry in find_published("videomme_v2")
        if entry.metric == "Non-Lin"
    }
    assert values["Keye-VL-2.0-30B-A3B", "512 frames"] == 24.2
    assert find_published("no_such_task") == []


@pytest.mark.parametrize(("task", "word"), [
    ("videomme_v2", "capital"), ("videomme", "VLMEvalKit never"), ("kcmmbench_spu", "yes and no"),
    ("timelens_charades", "span"),
])  # fmt: skip
def test_the_fault_of_the_closest_name_is_shown(task: str, word: str) -> None:
    assert word in (find_fault(task) or "")


def test_tasks_without_a_known_fault_have_none() -> None:
    assert find_fault("mmvu_like") == FAULTS["mmvu"]
    assert find_fault("needle_video") is None and find_fault("mm") is None
