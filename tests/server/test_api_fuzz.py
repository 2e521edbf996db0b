"""The benchmark that makes requests from /openapi.json, for a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_no_request_makes_the_server_fail() -> None:
    command = [sys.executable, "-m", "benchmarks.api_fuzz", "--cases", "100", "--seed", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["failures"] == []
    assert result["cases"] == 100 and result["alive"]
