"""Runs of several processes on a tiny model, and runs by `torchrun`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.config.toml import to_toml
from keye.train.loop import train
from keye.train.output import LOG_FILE
from keye.train.recipes.family.config import FamilyConfig, FamilyStage
from keye.train.recipes.family.recipe import FamilyRecipe
from tests.support.family import family_stage, talk, write_rows
from tests.support.tiny import tiny_folder

#: A minute of processor time each.
LONG = pytest.mark.skipif(not os.environ.get("KEYE_LONG_TESTS"), reason="set KEYE_LONG_TESTS=1: minutes each")
ROWS = [talk("What is shown? " * (1 + number % 5), f"red circle {number % 7}") for number in range(60)]


def text_stage(folder: Path, **fields: Any) -> FamilyStage:
    """Four packs a step of short texts."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, ROWS)
    defaults: dict[str, Any] = {"steps": 50, "max_tokens": 48, "batch": 4, "lr": 1e-3, "warmup_steps": 5}
    return family_stage(data, **{**defaults, **fields})


def picture_stage(folder: Path, **fields: Any) -> FamilyStage:
    """Three packs a step, of texts and of pictures of several sizes."""
    rows: list[dict[str, Any]] = []
    for number in range(24):
        if number % 3:
            rows.append(talk(f"What is {number}?", f"red circle {number % 7}"))
            continue
        path = folder / f"{number}.png"
        Image.new("RGB", (56 + 28 * (number % 4), 56), (10 * number, 99, 0)).save(path)
        rows.append(talk("See <image>", "red circle", images=[str(path)]))
    data = write_rows(folder / "pictures.jsonl", rows)
    defaults: dict[str, Any] = {"packing": False, "batch": 3, "max_tokens": 128, "lr": 1e-3, "features_gib": 0}
    return family_stage(data, **{**defaults, **fields})


def text_run(folder: Path, name: str, stage: FamilyStage, **fields: Any) -> FamilyConfig:
    """A run of the family's recipe from seeded weights."""
    model = folder / "model"
    if not model.exists():
        tiny_folder(model, weights=False)
    defaults: dict[str, Any] = {"fresh": True, "seed": 3, "fused": False, "dtype": "float32", "log_seconds": 0.0}
    return FamilyConfig(model=model, output=folder / name, stages=(stage,), **{**defaults, **fields})


def train_text(config: FamilyConfig, **options: Any) -> list[dict[str, Any]]:
    """The log of a run in this process and those that it starts."""
    train(config, FamilyRecipe(), **options)
    return read_log(config.output)


def read_log(output: Path) -> list[dict[str, Any]]:
    """The steps in a run's log."""
    lines = [json.loads(line) for line in (output / LOG_FILE).read_text().splitlines()]
    return [line for line in lines if "step" in line]


def torchrun(config: FamilyConfig, processes: int, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun -m keye train` with a file of the configuration."""
    path = config.output.with_suffix(".toml")
    path.write_text(to_toml(config.model_copy(update={"output": config.output.absolute()})))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", "keye", "train", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def largest_difference(left: list[dict[str, Any]], right: list[dict[str, Any]], name: str = "loss") -> float:
    """The largest relative difference of a figure between two logs of the same steps."""
    assert [line["step"] for line in left] == [line["step"] for line in right]
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(left, right, strict=True))
