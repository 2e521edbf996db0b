"""Training names its device: batches are moved once, and whatever a step makes is made there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from keye.errors import KeyeError
from keye.train.optim import Optimizer, mark_trainable
from keye.train.recipes.nano.config import Mix, NanoStage
from tests.support.tiny import tiny_model
from tests.support.training import NANO_RECIPE, VISION, a_run, make_tensors, nano_stage, train_nano, weights

MIX = (Mix(frames=3, clips=2, questions=5),)
HELPERS = {"time_binding": 0.1, "pointing": 0.1, "events": 0.1}
STAGES = [
    VISION,
    nano_stage("dense", steps=2, mix=MIX, **HELPERS),
    nano_stage("warm-up", steps=2, mix=MIX, trains="indexer", attention="warmup"),
    nano_stage("sparse", steps=2, mix=MIX, trains="all", attention="sparse", **HELPERS),
]
FACTORIES = {torch.tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.from_numpy}


class RecordFactories(TorchFunctionMode):
    """Collects the calls that make a tensor of more than 8 numbers without a device."""

    def __init__(self) -> None:
        super().__init__()
        self.unplaced: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensor = func(*args, **(kwargs or {}))
        if func in FACTORIES and "device" not in (kwargs or {}) and tensor.numel() > 8:
            self.unplaced.append(func.__name__)
        return tensor


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_step_makes_its_tensors_on_the_device(stage: NanoStage) -> None:
    model = tiny_model().model
    objective = NANO_RECIPE.make_objective(stage, model)
    optimizer = Optimizer(mark_trainable(model, stage))
    batch = make_tensors(stage, 1)
    with RecordFactories() as record:
        objective.loss(model, batch, 1.0).backward()
        optimizer.step(1.0)
    assert record.unplaced == []


def test_a_device_that_does_not_exist(tmp_path: Path) -> None:
    config = a_run(tmp_path, "out", VISION, device="cuda:99")
    with pytest.raises(KeyeError, match="device 'cuda:99' cannot be used here"):
        train_nano(config)
    assert not config.output.exists()


def test_weights_may_be_float32(tmp_path: Path) -> None:
    config = a_run(tmp_path, "out", VISION, dtype="float32")
    assert {tensor.dtype for tensor in weights(train_nano(config)).values()} == {torch.float32}
