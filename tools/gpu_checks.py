"""Run everything that needs a GPU and write the results to one JSON file (`make gpu`).

    python tools/gpu_checks.py --output build/gpu.json [--seconds 480]

Equality tests come first: a benchmark of kernels that compute something else means nothing, so none runs after a
failure. Each step is a command with a limit, all of them together end within `--seconds`. The file is written after
each step. Exits with 1 where a step fails, and where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
Outcome = Literal["passed", "failed", "timeout", "skipped"]


@dataclass(frozen=True)
class Step:
    """A command; a benchmark's standard output is JSON. `expect` must occur in the output of a test."""

    name: str
    kind: Literal["equality", "benchmark"]
    arguments: Sequence[str]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    expect: str = ""


STEPS = (
    Step(
        "kernels against the reference", "equality",
        ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/ops/triton_cases.py",
         "tests/ops/triton_train_cases.py"], 180,
        {"KEYE_TEST_DEVICE": "cuda"},
    ),
    Step(
        "losses of training", "equality",
        ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/train/test_same_losses.py"], 30,
        {"KEYE_TEST_DEVICE": "cuda"},
    ),
    Step(
        "the demo question", "equality",
        ["-m", "keye", "ask", "src/keye/assets/demo.mp4", "when is the cyan triangle visible?", "--device", "cuda"], 60,
        expect="[[2.0, 14.0]]",
    ),
    Step("attention at 32K", "benchmark", ["-m", "benchmarks.gpu_attention", "--json", "--length", "32768"], 90),
    Step("attention at 128K", "benchmark", ["-m", "benchmarks.gpu_attention", "--json", "--length", "131072"], 120),
)  # fmt: skip


def run_step(step: Step, limit_s: float) -> dict[str, Any]:
    """Outcome, seconds, and the JSON of a benchmark or the end of the output."""
    began = time.monotonic()
    outcome: Outcome
    try:
        done = subprocess.run(
            [sys.executable, *step.arguments], cwd=ROOT, env={**os.environ, **step.environment}, timeout=limit_s,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        output, errors = done.stdout, done.stderr
        outcome = "passed" if done.returncode == 0 and step.expect in output else "failed"
    except subprocess.TimeoutExpired as error:
        output, errors = (part.decode() if isinstance(part, bytes) else "" for part in (error.stdout, error.stderr))
        outcome = "timeout"
    record: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
    if step.kind == "benchmark" and outcome == "passed":
        try:
            return {**record, "result": json.loads(output)}
        except ValueError:
            record["outcome"] = "failed"
    return {**record, "output": (output + errors)[-4000:]}


def run_steps(steps: Sequence[Step], seconds: float, save: Callable[[list[dict[str, Any]]], None]) -> bool:
    """Run the steps within a time, and `save` the records so far after each; return whether all passed."""
    deadline = time.monotonic() + seconds
    records: list[dict[str, Any]] = []
    for step in steps:
        remaining = deadline - time.monotonic()
        unequal = [r["name"] for r in records if r["kind"] == "equality" and r["outcome"] != "passed"]
        record: dict[str, Any] = {"name": step.name, "kind": step.kind}
        if step.kind == "benchmark" and unequal:
            record |= {"outcome": "skipped", "reason": f"not equal: {', '.join(unequal)}"}
        elif remaining <= 0:
            record |= {"outcome": "skipped", "reason": "no time is left"}
        else:
            record |= run_step(step, min(step.limit_s, remaining))
        records.append(record)
        print(f"{step.name}: {record['outcome']}", flush=True)
        save(records)
    return all(record["outcome"] == "passed" for record in records)


def describe_machine() -> dict[str, str] | None:
    """The card and the versions, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "card": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}",
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    options = parser.parse_args()
    machine = describe_machine()
    if machine is None:
        print("make gpu needs a GPU, and torch finds no CUDA device here: nothing was checked", file=sys.stderr)
        return 1

    def save(records: list[dict[str, Any]]) -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"machine": machine, "steps": records}, indent=1) + "\n")

    passed = run_steps(STEPS, options.seconds, save)
    print(f"results are in {options.output}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
