"""Kernels over vLLM's blocks, also those for GPUs, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("cache_cases.py")


def test_cases_with_the_interpreter() -> None:
    """The interpreter must be chosen before triton is imported: the cases run in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout[-6000:]
