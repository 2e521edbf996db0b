"""Short runs of training on a tiny model, and comparisons of what they make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from keye.train.loop import train
from keye.train.recipe import move_batch
from keye.train.recipes.nano.batches import PackedBatch, make_batch
from keye.train.recipes.nano.config import Mix, NanoConfig, NanoStage, NanoTable
from keye.train.recipes.nano.recipe import NanoRecipe
from tests.support.tiny import NANO, tiny_folder


def nano_stage(name: str, **fields: Any) -> NanoStage:
    """A stage whose fields may be its own or those of its table `nano`."""
    table = {key: fields.pop(key) for key in NanoTable.model_fields if key in fields}
    return NanoStage(name=name, nano=NanoTable(**table), **fields)


MIX = (Mix(frames=2, clips=2, questions=4),)
VISION = nano_stage("see", kind="vision", trains="vision", steps=2, batch=2, warmup_steps=1)
LANGUAGE = nano_stage("read", steps=5, mix=MIX, warmup_steps=1, time_binding=0.3)
SPARSE = nano_stage("select", steps=2, mix=MIX, warmup_steps=1, trains="all", attention="sparse")


def a_run(folder: Path, output: str, *stages: NanoStage, **options) -> NanoConfig:
    model = folder / "model"
    if not model.exists():
        tiny_folder(model, weights=False)
    defaults = {"fresh": True, "seed": 4, "fused": False, "save_steps": 2, "log_seconds": 0.0}
    return NanoConfig(recipe="nano", model=model, output=folder / output, stages=stages, **{**defaults, **options})


NANO_RECIPE = NanoRecipe()


def make_tensors(stage: NanoStage, seed: int, folder: Path = NANO) -> Any:
    """The batch of `seed` as tensors."""
    return move_batch(make_batch(stage, folder, seed), torch.device("cpu"))


def train_nano(config: NanoConfig, **options: Any) -> Path:
    """`keye.train.loop.train` with keye-nano's recipe."""
    return train(config, NANO_RECIPE, **options)


def question_spans(batch: PackedBatch[Any], row: int) -> list[tuple[int, int]]:
    """First and one past the last tail position of each question of a sequence."""
    trunk, tail = batch.trunk_ids.shape[1], batch.tail_ids.shape[1]
    begin = row * (trunk + tail) + trunk
    segments = [(start - begin, stop - begin) for start, stop, above in batch.segments.tolist() if above >= 0]
    return [(start, stop) for start, stop in segments if 0 <= start < tail]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same(left, right):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif dataclasses.is_dataclass(a):
            assert_same(a, b)
        else:
            assert a == b
