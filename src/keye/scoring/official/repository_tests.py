"""Tests of repositories as SWE-bench grades them: statuses out of a log of pytest, and whether an issue is resolved.

A status is read from whatever line begins with its name, so that the code under test can print one; ids end at the
first space. Nothing to pass counts as all passed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from keye.scoring.official.registry import Document, Fields, register

_STATUSES: Final = ("FAILED", "PASSED", "SKIPPED", "ERROR", "XFAIL")
_PASSING: Final = ("PASSED", "XFAIL")
_ABSENT: Final = "absent"

#: True is a success, False a failure; None is in neither list.
Judgement = Callable[[str, Mapping[str, Any]], bool | None]


@register("swebench_grading", "pytest_log", "swebench-5.0.2")
def parse_pytest_log(document: Document, prediction: Any) -> Fields:
    """Statuses by test id; a later line replaces an earlier one."""
    statuses: Fields = {}
    for line in prediction.split("\n"):
        if not line.startswith(_STATUSES):
            continue
        words = (line.replace(" - ", " ") if line.startswith("FAILED") else line).split()
        # pytest's summary has a count there: SKIPPED [1] tests/a.py:3: reason
        if len(words) > 1 and not (words[0] == "SKIPPED" and re.fullmatch(r"\[\d+\]", words[1])):
            statuses[words[1]] = words[0]
    return statuses


@register("swebench_grading", "grade", "swebench-5.0.2")
def grade_tests(document: Document, prediction: Any) -> Fields:
    """Grades `status` (by test id) by the tests that must pass now and those that must go on to.

    Successes and failures of both lists (`f2p`, `p2p`), their rates, and `resolution`: RESOLVED_FULL, _PARTIAL or _NO.
    """
    statuses, kind = document["status"], document["eval_type"]
    if kind not in ("pass_and_fail", "fail_only"):
        return {"error": "ValueError"}
    fixed = _sort(document["fail_to_pass"], statuses, _is_fixed if kind == "pass_and_fail" else _did_not_fail)
    maintained = _sort(document["pass_to_pass"], statuses, _is_maintained if kind == "pass_and_fail" else _did_not_fail)
    fixed_rate, maintained_rate = _rate(fixed), _rate(maintained)
    resolution = "RESOLVED_NO"
    if maintained_rate == 1 and fixed_rate > 0:
        resolution = "RESOLVED_FULL" if fixed_rate == 1 else "RESOLVED_PARTIAL"
    return {
        "f2p": fixed,
        "p2p": maintained,
        "f2p_rate": fixed_rate,
        "p2p_rate": maintained_rate,
        "resolution": resolution,
    }


def _sort(names: Sequence[str], statuses: Mapping[str, Any], judge: Judgement) -> dict[str, list[str]]:
    outcomes = [(name, judge(name, statuses)) for name in names]
    return {
        "success": [name for name, outcome in outcomes if outcome is True],
        "failure": [name for name, outcome in outcomes if outcome is False],
    }


def _rate(tests: Mapping[str, Sequence[str]]) -> float:
    successes, failures = len(tests["success"]), len(tests["failure"])
    return successes / (successes + failures) if successes + failures else 1


def _is_fixed(name: str, statuses: Mapping[str, Any]) -> bool | None:
    status = _find_status(name, statuses)
    if status in _PASSING:
        return True
    return False if status in (_ABSENT, "FAILED", "ERROR", "SKIPPED") else None


def _is_maintained(name: str, statuses: Mapping[str, Any]) -> bool | None:
    """A test that is skipped has not become worse."""
    return True if _find_status(name, statuses) == "SKIPPED" else _is_fixed(name, statuses)


def _did_not_fail(name: str, statuses: Mapping[str, Any]) -> bool:
    """For runners that report failures alone; ERROR is none of them."""
    return statuses.get(name) != "FAILED"


def _find_status(name: str, statuses: Mapping[str, Any]) -> Any:
    """The status of a test; of an id that was cut within its parameters, that of the tests that begin so, if all pass
    or none does."""
    if name in statuses:
        return statuses[name]
    if name.count("[") > name.count("]"):
        matches = [status for other, status in statuses.items() if other.startswith(name)]
        if len({status in _PASSING for status in matches}) == 1:
            return matches[0]
    return _ABSENT
