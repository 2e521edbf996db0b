"""Official scorers return what the implementations that they are named for returned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keye.errors import KeyeError
from tests.support.golden_evals import GoldenFile, check_file, is_marked, iter_differences

#: So many differences are listed for a file.
LISTED = 10


def test_scorer_agrees_with_golden_results(
    golden_file: GoldenFile, implementation: str, record_property: Callable[[str, object], None]
) -> None:
    """Results that are marked random or judged count as skipped, though what they hold is compared as well."""
    outcome = check_file(golden_file, implementation)
    record_property("scoring", outcome.counts)
    problems = outcome.problems
    if not problems:
        return
    sentence = f"{len(problems)} of {sum(outcome.counts.values())} results of {implementation} differ"
    listing = "\n".join(f"  {problem[:600]}" for problem in problems[:LISTED])
    pytest.fail(
        f"{golden_file.path.name}: {sentence}; the first {min(len(problems), LISTED)}:\n{listing}", pytrace=False
    )


@pytest.mark.parametrize(
    ("got", "want", "difference"),
    [
        ({"score": 0.3333334}, {"score": 0.333333333}, None),
        ({"score": 0.33334}, {"score": 0.333333333}, "score is 0.33334, expected 0.333333333"),
        ({"score": 1}, {"score": 1.0}, None),
        ({"score": True}, {"score": 1}, "score is True, expected 1"),
        ({"spans": [[1, 2]]}, {"spans": [[1, 3]]}, "spans[0][1] is 2, expected 3"),
        ({"spans": [[1, 2]]}, {"spans": []}, "spans is [[1, 2]], expected []"),
        ({}, {"score": None}, "score is missing, expected None"),
        ({"score": 0, "how": "regex"}, {"score": 0}, "how is 'regex', expected no such field"),
        ({"text": "a"}, {"text": None}, "text is 'a', expected None"),
    ],
)
def test_differences_are_named(got: dict[str, Any], want: dict[str, Any], difference: str | None) -> None:
    assert list(iter_differences(got, want)) == ([difference] if difference else [])


def test_results_that_need_a_draw_or_a_judge_are_marked() -> None:
    assert is_marked({"extracted": "<RANDOM>", "score": 0, "random": True})
    assert is_marked({"score": None, "judge_needed": True})
    assert not is_marked({"score": 0, "random": False})
    assert not is_marked({"default": {"judge_needed": True}, "judge_echo": {"score": 1}})
    assert not is_marked({})


def test_an_unknown_implementation_is_a_difference_that_says_so(tmp_path: Path) -> None:
    line = {"id": "x-1", "task": "x", "kind": "item", "input": {}, "prediction": "A", "official": {"unknown": {}}}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    outcome = check_file(GoldenFile(tmp_path / "x.jsonl"), "unknown")
    assert outcome.counts == {"passed": 0, "failed": 1, "skipped": 0}
    assert "'unknown' does not score x (item)" in outcome.problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 2: not JSON"), ("3", "line 2: not an object"), ('{"id": "x"}', "line 2: lacks task")],
)
def test_a_broken_line_of_golden_data_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(f"\n{text}\n", encoding="utf-8")
    with pytest.raises(KeyeError, match=message):
        _ = GoldenFile(tmp_path / "x.jsonl").implementations
