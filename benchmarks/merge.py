"""Averages of models that were fine-tuned from one, searched on FrameForge clips and measured on others.

    python -m benchmarks.merge RUN_A RUN_B [RUN_C ...] -o FOLDER [--dev 600] [--test 2000] [--trials 24]

The models are folders of one architecture, such as keye-nano after different last stages. Weights are searched on `dev`
questions (`keye merge --search` with another score: the mean of accuracy and mIoU); each model, the plain mean and the
average of the best weights are then measured on `test` questions that the search never saw. An interrupted search goes
on in FOLDER. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import keye
from keye import Keye
from keye.evals.tasks.frameforge import EvalOptions, evaluate
from keye.train.merge import Average
from keye.train.merge_search import search_average

#: Seeds of the clips to search on and to measure on.
DEV_SEED, TEST_SEED = 1, 0


@dataclass(frozen=True)
class Clips:
    """FrameForge questions as held-out data."""

    questions: int
    frames: tuple[int, int]
    seed: int
    score: str = "mean of accuracy and mIoU"

    @property
    def digest(self) -> str:
        return f"frameforge {self.questions} {self.frames} {self.seed}"

    def measure(self, model: Keye) -> dict[str, Any]:
        """All figures."""
        return evaluate(model.runtime, EvalOptions(questions=self.questions, frames=self.frames, seed=self.seed))

    def evaluate(self, model: Keye) -> float:
        """From 0 to 100."""
        figures = self.measure(model)
        return float(figures["accuracy"] + figures["miou"]) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dev", type=int, default=600)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--frames", type=int, nargs=2, default=(16, 32))
    parser.add_argument("--trials", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frames = arguments.frames[0], arguments.frames[1]
    dev, test = Clips(arguments.dev, frames, DEV_SEED), Clips(arguments.test, frames, TEST_SEED)
    average = Average(arguments.models)
    result = search_average(average, dev, arguments.output, trials=arguments.trials, open_model=keye.load)
    count, rows = len(arguments.models), []
    candidates = {str(folder): tuple(float(i == j) for j in range(count)) for i, folder in enumerate(arguments.models)}
    candidates |= {"mean": (1 / count,) * count, "search": result.best.weights}
    for name, weights in candidates.items():
        folder = arguments.output / "model"
        average.write(weights, folder)
        for file in arguments.models[0].iterdir():
            if file.suffix in (".json", ".txt", ".jinja") and "safetensors" not in file.name:
                (folder / file.name).write_bytes(file.read_bytes())
        figures = test.measure(keye.load(folder))
        row = {key: figures[key] for key in ("accuracy", "accuracy_error", "miou", "miou_error")}
        rows.append({"model": name, "weights": weights, **row, "score": (row["accuracy"] + row["miou"]) / 2})
    best = max(row["score"] for row in rows[:count])
    print(json.dumps({"dev": arguments.dev, "test": arguments.test, "trials": len(result.trials), "test_rows": rows,
                      "gain_over_best_model": round(rows[-1]["score"] - best, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
