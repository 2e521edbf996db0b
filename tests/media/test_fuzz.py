"""Damaged media for some seconds; `benchmarks/fuzz_media.py` does the same for as long as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fuzz_media.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors and processes in /proc")
def test_damaged_media_for_a_while() -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--minutes", "0.3", "--seed", "7", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    report = json.loads(done.stdout)
    assert report["findings"] == []
    assert done.returncode == 0
    assert report["files"] > 20
    assert report["before_and_after"]["children"] == [0, 0]
