"""The small model of the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import keye
from keye import Keye
from tests.support.engine import write_clip


@pytest.fixture
def load(folder: Path) -> Callable[..., Keye]:
    return lambda **options: keye.load(folder, dtype="float32", **options)


@pytest.fixture
def model(load: Callable[..., Keye]) -> Keye:
    return load()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames in four seconds."""
    return write_clip(tmp_path_factory.mktemp("media") / "short.mp4")
