"""What a recipe brings to the training loop: weights to begin with, batches, and losses."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from keye.config import KeyeConfig
from keye.models.keye import KeyeModel
from keye.train.config import TrainConfig


class Figures:
    """Sums and counts by name; `take` returns means and starts again."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        entry = self._sums[name]
        entry[0] += value
        entry[1] += count

    def take(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in sorted(self._sums.items()) if count}
        self._sums.clear()
        return means


class Objective(Protocol):
    """What one stage minimises."""

    figures: Figures

    @property
    def heads(self) -> nn.Module:
        """What is trained besides the model and thrown away afterwards."""

    def loss(self, model: KeyeModel, batch: Any) -> Tensor:
        """The scalar to minimise, of a batch that is on the model's device."""


class Recipe(Protocol):
    """A kind of training. Recipes are stateless and can be pickled."""

    @property
    def config(self) -> type[TrainConfig]:
        """The model of its files: `TrainConfig` with the recipe's own tables."""

    def create_model(self, config: KeyeConfig, folder: Path, seed: int) -> KeyeModel:
        """Float32 weights for a model that is trained from nothing; `folder` has its tokenizer."""

    @property
    def make_batch(self) -> Callable[[Any, Path, int], Any]:
        """A function of a module, (stage, model folder, seed) -> dataclass of numpy arrays; runs in other processes."""

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
