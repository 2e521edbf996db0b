"""Short stages of the family's recipe on a tiny model and files of samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from keye.models.keye import KeyeModel
from keye.train.optim import mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes.family.config import DataConfig, FamilyStage
from keye.train.recipes.family.objectives import NextToken
from keye.train.recipes.family.sources import open_batches
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.tiny import tiny_config


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(question: str, reply: str, **fields: Any) -> dict[str, Any]:
    """A row: a question with its reply."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **fields}


def family_stage(data: Path, **fields: Any) -> FamilyStage:
    """A stage over a file."""
    defaults: dict[str, Any] = {"name": "s", "steps": 2, "max_tokens": 128, "trains": "all", "warmup_steps": 0}
    return FamilyStage(data=(DataConfig(path=str(data)),), **(defaults | fields))


def all_steps(stage: FamilyStage, folder: Path, *, rank: int = 0, size: int = 1, state: Any = None) -> list[Any]:
    """The batches of one pass."""
    source = open_batches(stage.model_copy(update={"epochs": 1.0}), folder, seed=3, rank=rank, size=size, state=state)
    steps = []
    while (step := source.next()) is not None:
        steps.append(step)
    source.close()
    return steps


def first_micro(stage: FamilyStage, folder: Path) -> tuple[Any, float]:
    """The first micro-batch as tensors, and the denominator of its step."""
    step = all_steps(stage, folder)[0]
    return move_batch(step.micro[0], torch.device("cpu")), step.count


def tiny_network(seed: int = 0) -> KeyeModel:
    """Fresh weights, float32."""
    return fresh_model(tiny_config(), seed)


def learn(model: KeyeModel, stage: FamilyStage, folder: Path, steps: int, lr: float = 1e-2) -> None:
    """Trains the model on the first batch of a stage."""
    optimizer = torch.optim.AdamW([each.parameter for each in mark_trainable(model, stage)], lr=lr)
    objective = NextToken(stage, model)
    micro, count = first_micro(stage, folder)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.loss(model, micro, count).backward()
        optimizer.step()
