"""What a recipe brings to the training loop: weights to begin with, batches, and losses."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from keye.config import KeyeConfig
from keye.models.keye import KeyeModel
from keye.train.batches import BatchSource, OpenBatches
from keye.train.config import TrainConfig
from keye.train.optim import Trained


class Figures:
    """Sums and counts by name; `take` returns means and starts again."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        entry = self._sums[name]
        entry[0] += value
        entry[1] += count

    def sums(self) -> dict[str, tuple[float, float]]:
        """Sums and counts by name; starts again."""
        sums = {name: (total, count) for name, (total, count) in sorted(self._sums.items())}
        self._sums.clear()
        return sums

    def take(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums().items() if count}


#: Replaces tensors by their sums over the processes of a run.
AddUp = Callable[[Sequence[Tensor]], None]


class Objective(Protocol):
    """What one stage minimises."""

    figures: Figures

    @property
    def heads(self) -> nn.Module:
        """What is trained besides the model and thrown away afterwards."""

    def loss(self, model: KeyeModel, micro: Any, count: float) -> Tensor:
        """The scalar to minimise of a micro-batch on the model's device: its weighted losses' sum divided by `count`.
        The gradients of all micro-batches of all processes are added up, so that a step does not depend on how its
        tokens are divided among them."""

    def finish_step(self, add_up: AddUp) -> None:
        """Called after the last micro-batch of a step, in every process; `add_up` replaces float32 tensors by their
        sums over the processes."""


class Recipe(Protocol):
    """A kind of training. Recipes are stateless and can be pickled."""

    @property
    def config(self) -> type[TrainConfig]:
        """The model of its files: `TrainConfig` with the recipe's own tables."""

    def create_model(self, config: KeyeConfig, folder: Path, seed: int) -> KeyeModel:
        """Float32 weights for a model that is trained from nothing; `folder` has its tokenizer."""

    def begin_run(self, model: KeyeModel, run: TrainConfig) -> None:
        """Called once, after the model was made or loaded and before it is divided among processes."""

    def begin_stage(
        self, stage: Any, model: KeyeModel, folder: Path, *, seed: int, resumed: bool
    ) -> Mapping[str, float]:  # fmt: skip
        """Called before everything else of a stage; `resumed`: some of its steps are done. Returns figures to log."""

    def end_stage(self, stage: Any, model: KeyeModel, folder: Path) -> Mapping[str, float]:
        """Called after the last step of a stage, before the model is written. Returns figures to log."""

    def save(self, model: KeyeModel, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
        """Writes what the run has made, so that `folder` loads. `tensors` is the model's state, which a model that is
        divided among processes does not hold itself. Called in process 0."""

    def prepare(self, model: KeyeModel, stage: Any) -> list[Trained]:
        """Makes the model ready for a stage, marks what it changes, and returns that."""

    @property
    def open_batches(self) -> OpenBatches:
        """A function of a module, which other processes call; making batches need not import torch."""

    def open_validation(self, stage: Any, folder: Path, *, rank: int, size: int) -> BatchSource | None:
        """Batches whose loss is measured now and then; None where there are none."""

    def make_objective(self, stage: Any, model: KeyeModel) -> Objective:
        """The losses of a stage."""


def move_batch(batch: Any, device: torch.device) -> Any:
    """A dataclass with its numpy arrays, also those of dataclasses in it, as tensors on `device`."""
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch).to(device)
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return batch
    return dataclasses.replace(
        batch, **{field.name: move_batch(getattr(batch, field.name), device) for field in dataclasses.fields(batch)}
    )
