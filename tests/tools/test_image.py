"""`make image` where images cannot be built: one sentence, a failure only if they had to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

IMAGE = Path(__file__).parents[2] / "tools/image.py"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [([], "none of docker, podman and buildah works here"), (["--engine", "podman"], "podman does not work here")],
)
def test_without_an_engine(tmp_path: Path, arguments: list[str], reason: str) -> None:
    for option, status in (([], 1), (["--if-possible"], 0)):
        command = [sys.executable, str(IMAGE), *arguments, *option]
        done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stdout == f"container images were not built: {reason}\n"
