"""Workflows run what a person can run: make targets that exist, on the versions of Python that the package names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [*WORKFLOWS.values(), (ROOT / ".ci/run").read_text()]
    called = {target for text in texts for target in re.findall(r"\bmake ([a-z][\w-]*)", text)}
    assert called <= targets
    assert {"lint", "docs", "test", "slow", "dist", "image", "audit", "test-vllm", "test-clients"} <= called
    assert "test-peers" in called


def test_every_supported_python_is_tested() -> None:
    (versions,) = re.findall(r"python: \[(.+)\]", WORKFLOWS["ci"])
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", name)]
    assert re.findall(r"[\d.]+", versions) == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_both_images_are_tried_and_published() -> None:
    files = {path.name for path in ROOT.glob("Dockerfile*")}
    assert all(name in WORKFLOWS[workflow] for workflow in ("ci", "release") for name in files)
    assert files == {"Dockerfile", "Dockerfile.cuda"}
