"""Short clips, and the command line in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from keye.data.frameforge import make_clip, write_mp4


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four videos of eight frames, 112 x 112 pixels."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(4):
        write_mp4(make_clip(seed, frames=8, objects=2, start=0.0, step=0.5), folder / f"{seed}.mp4", (112, 112))
    return sorted(folder.iterdir())
