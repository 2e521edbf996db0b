"""`make gpu`: equality tests come before benchmarks and stop them, limits hold, and one file has all results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tools.gpu_checks import ROOT, STEPS, Step, run_steps


def run(steps: list[Step], seconds: float = 60) -> tuple[bool, list[dict[str, Any]], list[int]]:
    saved: list[list[dict[str, Any]]] = []
    passed = run_steps(steps, seconds, lambda records: saved.append(list(records)))
    return passed, saved[-1], [len(records) for records in saved]


EQUAL = Step("equal", "equality", ["-c", "print('the same')"], 30, expect="the same")
FAST = Step("fast", "benchmark", ["-c", "print('{\"ms\": 1.5}')"], 30)


def test_results_of_benchmarks_are_in_the_records() -> None:
    passed, records, lengths = run([EQUAL, FAST])
    assert passed and [record["outcome"] for record in records] == ["passed", "passed"]
    assert records[1]["result"] == {"ms": 1.5}
    assert lengths == [1, 2], "saved after each step"


def test_a_failed_equality_test_skips_the_benchmarks() -> None:
    other = Step("other", "equality", ["-c", "print('another answer')"], 30, expect="the same")
    passed, records, _ = run([other, EQUAL, FAST])
    assert not passed and [record["outcome"] for record in records] == ["failed", "passed", "skipped"]
    assert "another answer" in records[0]["output"] and records[2]["reason"] == "not equal: other"


def test_steps_have_an_environment_and_errors_are_kept() -> None:
    code = "import os, sys; sys.exit('device ' + os.environ['KEYE_TEST_DEVICE'])"
    passed, (record,), _ = run([Step("fails", "equality", ["-c", code], 30, {"KEYE_TEST_DEVICE": "cuda"})])
    assert not passed and "device cuda" in record["output"]


def test_a_benchmark_without_json_fails() -> None:
    passed, (record,), _ = run([Step("text", "benchmark", ["-c", "print('1.5 ms')"], 30)])
    assert not passed and record["outcome"] == "failed"


def test_limits_hold() -> None:
    _, (late,), _ = run([Step("slow", "benchmark", FAST.arguments, limit_s=0)])
    assert late["outcome"] == "timeout"
    _, (skipped,), _ = run([FAST], seconds=0)
    assert skipped == {"name": "fast", "kind": "benchmark", "outcome": "skipped", "reason": "no time is left"}


def test_steps_fit_eight_minutes_and_name_what_exists() -> None:
    assert sum(step.limit_s for step in STEPS) <= 480
    kinds = [step.kind for step in STEPS]
    assert kinds == sorted(kinds, key=["equality", "benchmark"].index)
    for word in (word for step in STEPS for word in step.arguments):
        path = f"{word.replace('.', '/')}.py" if word.startswith("benchmarks.") else word
        assert not re.match(r"(tests|src|benchmarks)/", path) or (ROOT / path).exists(), path


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/gpu_checks.py"), "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 1 and not output.exists()
    assert done.stderr == "make gpu needs a GPU, and torch finds no CUDA device here: nothing was checked\n"


def test_records_are_json(tmp_path: Path) -> None:
    _, records, _ = run([EQUAL, FAST])
    assert json.loads(json.dumps(records)) == records
