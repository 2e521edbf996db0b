"""Processes of a batch are killed, and every item is in the output once: `benchmarks/batch_kill.py` with few items."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("engines", ["processes", "ray"])
def test_every_item_is_there_once_whatever_is_killed(engines: str) -> None:
    if engines == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra: pip install keye[ray]")
    command = [sys.executable, "-m", "benchmarks.batch_kill", "--items", "60", "--videos", "4", "--workers", "2"]
    environment = {**os.environ, "RAY_worker_niceness": "0"}  # beside other tests they would hardly run
    done = subprocess.run(
        [*command, *(["--ray"] if engines == "ray" else [])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    runs = json.loads(done.stdout)["runs"]
    assert list(runs) == ["undisturbed", "worker", "half", "driver"]
    for run in runs.values():
        assert (run["records"], run["missing"], run["twice"], run["errors"], run["left"]) == (60, 0, 0, 0, 0)
    assert [run["killed"] for run in runs.values()] == [0, 1, 1, 2]
