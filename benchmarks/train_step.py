"""What compiling the element-wise operations gains in training: seconds of keye-nano's steps, plain against fused.

One thread, the same batches, fresh weights; the first steps, which compile, are not counted. Prints JSON. Run:
    python benchmarks/train_step.py [--steps 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from keye.config import load_model_config
from keye.ops.elementwise import PLAIN, Elementwise, compile_elementwise
from keye.train.optim import mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes.nano.batches import make_batch
from keye.train.recipes.nano.config import Mix, NanoStage, NanoTable
from keye.train.recipes.nano.initialise import fresh_model
from keye.train.recipes.nano.recipe import NanoRecipe

NANO = Path(__file__).parents[1] / "configs" / "nano"
STAGE = NanoStage(name="step", steps=1, nano=NanoTable(mix=(Mix(frames=16, clips=4, questions=16),)))


def step_seconds(steps: int, elementwise: Elementwise) -> list[float]:
    """Seconds of the forward and backward passes of `steps` steps, after three that warm up."""
    model = fresh_model(load_model_config(NANO), 0).bfloat16().train()
    model.set_elementwise(elementwise)
    mark_trainable(model, STAGE)
    objective, seconds = NanoRecipe().make_objective(STAGE, model), []
    for number in range(steps + 3):
        batch = move_batch(make_batch(STAGE, NANO, number), model.device)
        begin = time.perf_counter()
        objective.loss(model, batch, 1.0).backward()
        seconds.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
    return seconds[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {}
    plain = step_seconds(arguments.steps, PLAIN)
    result["plain_s"] = [round(s, 3) for s in plain]
    if (compiled := compile_elementwise(torch.device("cpu"))) is not None:
        fused = step_seconds(arguments.steps, compiled)
        result["fused_s"] = [round(s, 3) for s in fused]
        result["ratio"] = round(statistics.median(plain) / statistics.median(fused), 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
