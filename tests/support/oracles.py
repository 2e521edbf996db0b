"""Packages that slow tests compare with, in a folder beside the checkout (`make slow` installs them)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("KEYE_ORACLES", Path(__file__).parents[2] / ".venv-oracles"))


def oracle(name: str) -> Any:
    """The module; the test is skipped where it is not installed."""
    if not (FOLDER / name.partition(".")[0]).is_dir():
        pytest.skip(f"{name} is not installed in {FOLDER}: make slow installs it")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # last: packages that keye installs come first
        importlib.invalidate_caches()
    return importlib.import_module(name)
