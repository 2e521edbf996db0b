"""The training loop: stages one after another, batches made ahead, logs, checkpoints that can be resumed.

It knows no recipe: `keye.train.recipe` says what a recipe brings.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keye.config import ConfigError, load_model_config
from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.models.load import load_model, save_model, torch_dtype
from keye.models.quant_fill import quantized_weights
from keye.ops.elementwise import compile_elementwise
from keye.process import check_device
from keye.train.batches import BatchProcess, derived_seed
from keye.train.checkpoint import LOG_FILE, PROGRESS_FILE, Checkpoint, Progress, check_output, copy_companions
from keye.train.config import StageConfig, TrainConfig
from keye.train.optim import Optimizer, Trained, highest_rate
from keye.train.parallel import Group, processes
from keye.train.recipe import Objective, Recipe, move_batch

Report = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig, recipe: Recipe, *, resume: bool = True, report: Report | None = None, decode: str | None = None
) -> Path:
    """Runs every stage that is not done yet and returns the output folder, which is a loadable model.

    With `resume`, a run that was interrupted goes on at its last checkpoint; without, an existing output is an error.
    `decode` is the address of a decode service (`keye.cluster.service.open_service`) whose workers make the batches; on
    a cluster they read the tokenizer in the output folder, which must be on a disk that all nodes share.
    """
    check_device(config.device)
    is_new = check_output(config, resume)
    load_model_config(config.model)  # a mistake there is reported before anything is written
    config.output.mkdir(parents=True, exist_ok=True)
    try:
        with processes(config.processes, config.output, partial(_train, config, recipe, None, decode)) as group:
            _train(config, recipe, report, decode, group)
    except KeyeError:
        if is_new and not (config.output / PROGRESS_FILE).exists():
            shutil.rmtree(config.output)
        raise
    return config.output


def _train(config: TrainConfig, recipe: Recipe, report: Report | None, decode: str | None, group: Group) -> None:
    """Every stage that is not done yet, in one of the run's processes."""
    torch.set_num_threads(config.threads)
    run = Run(config, recipe, report, group, decode)
    try:
        for number in range(run.progress.stage, len(config.stages)):
            run.train_stage(number)
    finally:
        run.batches.close()


class Run:
    """One training run: the model, how far it is, and its files."""

    def __init__(
        self, config: TrainConfig, recipe: Recipe, report: Report | None, group: Group, decode: str | None
    ) -> None:
        self.config, self.recipe, self.report, self.group = config, recipe, report, group
        self.out, self.dtype = config.output, torch_dtype(config.dtype)
        self.checkpoint = Checkpoint(self.out, [stage.name for stage in config.stages])
        if group.rank == 0:
            copy_companions(config.model, self.out)
        self.progress, self._state = self.checkpoint.load()
        self.model = self._load_model()
        if config.fused and (fused := compile_elementwise(self.model.device)) is not None:
            self.model.set_elementwise(fused)
        elif config.fused:
            text = "no C++ compiler works here, so element-wise operations stay unfused and slower"
            warnings.warn(text, stacklevel=2)
        group.agree(0.0)  # every process waits until the files of the output folder are there
        self.batches, self.decode = BatchProcess(), decode

    def _load_model(self) -> KeyeModel:
        config = load_model_config(self.config.model)
        resumed = (self.out / PROGRESS_FILE).exists()
        if self.config.fresh and not resumed:
            model = self.recipe.create_model(config, self.config.model, self.config.seed)
            return model.to(device=self.config.device, dtype=self.dtype)
        folder = self.out if resumed else self.config.model
        model, report = load_model(folder, config, device=self.config.device, dtype=self.dtype)
        if quantized_weights(model):
            raise ConfigError(f"{folder} is quantised and cannot be trained; start from the model it was made of")
        if report.lacks_indexer:
            raise ConfigError(f"{folder} has no indexer weights; start from a checkpoint that has them")
        return model

    def train_stage(self, number: int) -> None:
        """Runs stage `number` to its end and saves."""
        stage = self.config.stages[number]
        torch.manual_seed(derived_seed(self.config.seed, number, stage.name, "heads"))
        objective = self.recipe.make_objective(stage, self.model)
        objective.heads.to(self.model.device)
        rate = highest_rate(stage, "heads", is_matrix=False)
        heads = [Trained(f"heads.{name}", p, False, rate) for name, p in objective.heads.named_parameters()]
        trained = [*self.recipe.prepare(self.model, stage), *heads]
        optimizer = Optimizer(trained, group=self.group, weight_decay=stage.weight_decay, clip=stage.clip)
        if self._state is not None:
            optimizer.load_state(self._state)
            self._state = None
        self.model.train()
        clock = Clock(self.progress, self.config)
        self._open_batches(number)
        norm = 0.0
        while True:
            progress = self.group.agree(stage.share_done(clock.step, clock.seconds() / 60))
            if progress >= 1.0 or (batch := self.batches.next()) is None:
                break
            factor = stage.lr_factor(clock.step, max(progress, batch.share))
            # Every step has its own random numbers, so that a resumed run draws those of an uninterrupted one.
            torch.manual_seed(derived_seed(self.config.seed, number, stage.name, "loss", clock.step, self.group.rank))
            for micro in batch.micro:
                objective.loss(self.model, move_batch(micro, self.model.device), batch.count).backward()
            norm = optimizer.step(factor)
            clock.step += 1
            if self.group.rank == 0:
                if clock.log_due():
                    self._log(stage, clock, objective, norm)
                if clock.save_due():
                    self._save(Progress(number, clock.step, clock.seconds(), batch.state), optimizer)
        self.progress = Progress(number + 1)
        if self.group.rank == 0:
            if clock.step > clock.logged_step:
                self._log(stage, clock, objective, norm)
            self._save(self.progress)

    def _open_batches(self, number: int) -> None:
        stage = self.config.stages[number]
        seed = derived_seed(self.config.seed, number, stage.name)
        source = partial(self.recipe.open_batches, stage, self.out, seed=seed, rank=self.group.rank,
                         size=self.group.size, state=self.progress.data, decode=self.decode)  # fmt: skip
        self.batches.open(f"{number} {stage.name}", source)

    def _log(self, stage: StageConfig, clock: Clock, objective: Objective, norm: float) -> None:
        figures = {"stage": stage.name, "step": clock.step, "minutes": round(clock.seconds() / 60, 2),
                   "steps_per_second": round(clock.rate(), 3), "grad_norm": round_figure(norm),
                   **{name: round_figure(value) for name, value in objective.figures.take().items()}}  # fmt: skip
        with (self.out / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        if self.report is not None:
            self.report(figures)

    def _save(self, progress: Progress, optimizer: Optimizer | None = None) -> None:
        save_model(self.model, self.out, dtype=self.dtype)
        self.checkpoint.save(progress, None if optimizer is None else optimizer.state())


class Clock:
    """Steps and seconds of a stage, those before a resume included."""

    def __init__(self, progress: Progress, run: TrainConfig) -> None:
        self.step, self.run = progress.step, run
        self._before, self._begin = progress.seconds, time.monotonic()
        self._logged, self._saved, self.logged_step = self._begin, self._begin, self.step

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begin

    def rate(self) -> float:
        """Steps a second since the last call."""
        now = time.monotonic()
        rate = (self.step - self.logged_step) / max(1e-9, now - self._logged)
        self._logged, self.logged_step = now, self.step
        return rate

    def log_due(self) -> bool:
        return time.monotonic() - self._logged >= self.run.log_seconds

    def save_due(self) -> bool:
        by_steps = self.run.save_steps is not None and self.step % self.run.save_steps == 0
        if not by_steps and time.monotonic() - self._saved < self.run.save_minutes * 60:
            return False
        self._saved = time.monotonic()
        return True


def round_figure(value: float) -> float | None:
    """A figure of the log with four significant digits; None where it is not finite, which JSON cannot write."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
