"""Tests against llama.cpp and the package gguf: skipped with the reason where `make peers` was not run."""

from __future__ import annotations

import sys

import pytest

from tests.peers.install import FOLDER


@pytest.fixture(scope="session", autouse=True)
def _peers():
    if not (FOLDER / ".ready").is_file():
        pytest.skip("the peers are not installed: make peers")


@pytest.fixture(scope="session")
def gguf():
    """The package gguf."""
    sys.path.append(str(FOLDER / "python"))
    import gguf

    yield gguf
    sys.path.remove(str(FOLDER / "python"))
