"""Calls and tests of repositories as bfcl-eval and SWE-bench score them, faults included."""

from __future__ import annotations

from typing import Any

import pytest

from keye.scoring.official.registry import find_scorer

TRIM = {
    "name": "trim",
    "parameters": {
        "properties": {
            "path": {"type": "string"},
            "seconds": {"type": "float"},
            "sizes": {"type": "array", "items": {"type": "integer"}},
            "marks": {"type": "array", "items": {"type": "dict"}},
        },
        "required": ["path"],
    },
}
ANSWER = {"trim": {"path": ["a.mp4"], "seconds": [2.0, ""], "sizes": [[1, 2]], "marks": [[{"at": [1, ""]}], ""]}}


def score(calls: list[dict[str, Any]], category: str = "simple", **document: Any) -> dict[str, Any]:
    document = {"functions": [TRIM], "possible_answer": [ANSWER], "tuple_args": False, **document}
    return find_scorer("bfcl_ast", "item", "bfcl-eval-2026.3.23")({**document, "category": category}, calls)


@pytest.mark.parametrize(
    ("arguments", "failure"),
    [
        ({"path": "./A-MP4", "sizes": [1, 2]}, None),
        ({"path": "a.mp4", "sizes": [1, 2], "seconds": 2}, None),  # a whole number is a float
        ({"path": "a.mp4", "sizes": [1, 2], "seconds": True}, "type_error:simple"),
        ({"path": "a.mp4", "sizes": [1, "2"]}, "type_error:nested"),
        ({"path": "a.mp4", "sizes": [2, 1]}, "value_error:list/tuple"),
        ({"path": "a.mp4", "sizes": [1, 2], "marks": [{}]}, None),
        ({"path": "a.mp4", "sizes": [1, 2], "marks": [{"at": 2}]}, "value_error:list_dict_count"),  # "" is tried last
        ({"path": "a.mp4", "sizes": [1, 2], "marks": []}, None),  # as long as ""
        ({"path": "a.mp4"}, "simple_function_checker:missing_optional"),
        ({"sizes": [1, 2]}, "simple_function_checker:missing_required"),
        ({"path": "a.mp4", "sizes": [1, 2], "more": 1}, "simple_function_checker:unexpected_param"),
    ],
)
def test_first_failure_of_a_call_is_named(arguments: dict[str, Any], failure: str | None) -> None:
    assert score([{"trim": arguments}]) == {"valid": failure is None, "error_type": failure}


def test_parallel_calls_fit_in_any_order_but_each_once() -> None:
    answers = [{"trim": {"path": [name], "sizes": [[1]]}} for name in ("a", "b")]
    calls = [{"trim": {"path": name, "sizes": [1]}} for name in ("b", "a")]
    assert score(calls, "parallel", possible_answer=answers)["valid"]
    failure = score([calls[0], calls[0]], "parallel", possible_answer=answers)["error_type"]
    assert failure == "parallel_function_checker_no_order:cannot_find_match"


def test_lists_that_stand_for_tuples_are_no_arrays() -> None:
    call = {"trim": {"path": "a.mp4", "sizes": [1, 2]}}
    assert score([call])["valid"]
    assert score([call], tuple_args=True)["error_type"] == "type_error:simple"


def test_an_exception_of_the_original_is_the_result() -> None:
    function = {"name": "trim", "parameters": {"properties": {"path": {"type": "text"}}, "required": []}}
    call = {"trim": {"path": "a.mp4"}}
    assert score([call], functions=[function], possible_answer=[{"trim": {"path": ["x"]}}]) == {"error": "KeyError"}


@pytest.mark.parametrize(
    ("log", "statuses"),
    [
        ("PASSED tests/forged.py::t printed by the code", {"tests/forged.py::t": "PASSED"}),
        ("FAILED a.py::t[x y] - boom\nXPASS b.py::t", {"a.py::t[x": "FAILED"}),
        ("SKIPPED [12] a.py:3: why\nPASSED [12]\nSKIPPED c.py::t", {"[12]": "PASSED", "c.py::t": "SKIPPED"}),
        ("PASSED a.py::t\nERROR a.py::t", {"a.py::t": "ERROR"}),
    ],
)
def test_statuses_are_read_from_the_beginnings_of_lines(log: str, statuses: dict[str, str]) -> None:
    assert find_scorer("swebench_grading", "pytest_log", "swebench-5.0.2")({}, log) == statuses


@pytest.mark.parametrize(
    ("statuses", "kind", "resolution"),
    [
        ({"a": "PASSED", "b": "SKIPPED"}, "pass_and_fail", "RESOLVED_FULL"),
        ({"a": "SKIPPED", "b": "PASSED"}, "pass_and_fail", "RESOLVED_NO"),
        ({"a": "SKIPPED", "b": "ERROR"}, "fail_only", "RESOLVED_FULL"),
        ({}, "fail_only", "RESOLVED_FULL"),
        ({}, "pass_and_fail", "RESOLVED_NO"),
    ],
)
def test_resolution_depends_on_the_kind_of_runner(statuses: dict[str, str], kind: str, resolution: str) -> None:
    document = {"status": statuses, "fail_to_pass": ["a"], "pass_to_pass": ["b"], "eval_type": kind}
    assert find_scorer("swebench_grading", "grade", "swebench-5.0.2")(document, None)["resolution"] == resolution


def test_ids_that_were_cut_take_the_status_of_tests_that_agree() -> None:
    score_grade = find_scorer("swebench_grading", "grade", "swebench-5.0.2")
    document = {"fail_to_pass": ["t[log(a"], "pass_to_pass": [], "eval_type": "pass_and_fail"}
    agreeing = {"t[log(a b)]": "PASSED", "t[log(a c)]": "XFAIL"}
    assert score_grade({**document, "status": agreeing}, None)["f2p"]["success"] == ["t[log(a"]
    assert score_grade({**document, "status": {**agreeing, "t[log(a d)]": "FAILED"}}, None)["f2p_rate"] == 0
