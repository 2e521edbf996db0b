"""Short runs of training on a tiny model, and comparisons of what they make."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from keye.train.config import Mix, StageConfig, TrainConfig
from tests.support.tiny import tiny_folder

MIX = (Mix(frames=2, clips=2, questions=4),)
VISION = StageConfig("see", kind="vision", trains="vision", steps=2, batch=2, warmup_steps=1)
LANGUAGE = StageConfig("read", steps=5, mix=MIX, warmup_steps=1, time_binding=0.3)
SPARSE = StageConfig("select", steps=2, mix=MIX, warmup_steps=1, trains="all", attention="sparse")


def a_run(folder: Path, output: str, *stages: StageConfig, **options) -> TrainConfig:
    model = folder / "model"
    if not model.exists():
        tiny_folder(model, weights=False)
    defaults = {"fresh": True, "seed": 4, "fused": False, "save_steps": 2, "log_seconds": 0.0}
    return TrainConfig(model, folder / output, stages, **{**defaults, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same(one, two):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif dataclasses.is_dataclass(a):
            assert_same(a, b)
        else:
            assert a == b
