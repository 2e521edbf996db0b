"""Core hours of a configuration of keye-nano's recipe: measured seconds of a step of each stage, times its steps.

Processor time of one thread, so that a busy machine counts little: what the training process spends on a step (forward
and backward pass, optimiser), and what the process that makes the batches spends. Weights are new; the first steps are
not counted. Prints JSON. Run (about 5 minutes):
    python -m benchmarks.nano_budget [configs/nano.toml] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from keye.config import load_model_config
from keye.ops.registry import find_training_elementwise
from keye.train.optim import Optimizer, mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes import load_run
from keye.train.recipes.nano.batches import make_batch
from keye.train.recipes.nano.config import NanoStage
from keye.train.recipes.nano.initialise import fresh_model
from keye.train.recipes.nano.recipe import NanoRecipe

NANO = Path(__file__).parents[1] / "configs" / "nano.toml"
FIRST = 2


def step_seconds(stage: NanoStage, folder: Path, steps: int) -> dict[str, float]:
    """Mean seconds of a step of a stage, over the batches of its first seeds."""
    config = load_model_config(folder)
    model = fresh_model(config, 0).bfloat16().train()
    model.set_elementwise(find_training_elementwise(model.device, config.text.hidden_size))
    optimizer, objective = Optimizer(mark_trainable(model, stage)), NanoRecipe().make_objective(stage, model)
    making, training = 0.0, 0.0
    for number in range(FIRST + steps):
        begin = time.process_time()
        batch = move_batch(make_batch(stage, folder, number), model.device)
        ready = time.process_time()
        objective.loss(model, batch, 1.0).backward()
        optimizer.step(0.01)
        if number >= FIRST:
            making, training = making + ready - begin, training + time.process_time() - ready
    return {"batch_s": round(making / steps, 3), "step_s": round(training / steps, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=NANO)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config, _ = load_run(arguments.config)
    rows: list[dict[str, Any]] = []
    for stage in config.stages:
        assert isinstance(stage, NanoStage)
        assert stage.steps, f"stage {stage.name!r} is not decided by steps"
        measured = step_seconds(stage, config.model, arguments.steps)
        hours = stage.steps * config.processes * (measured["batch_s"] + measured["step_s"]) / 3600
        rows.append({"stage": stage.name, "steps": stage.steps, **measured, "core_hours": round(hours, 2)})
    print(json.dumps({"stages": rows, "core_hours": round(sum(row["core_hours"] for row in rows), 2)}, indent=2))


if __name__ == "__main__":
    main()
