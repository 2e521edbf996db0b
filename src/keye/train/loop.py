"""The loop: stages one after another, batches made ahead by a worker process, logs, checkpoints that can be resumed."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from keye.chat.tokenizer import Tokenizer
from keye.config import ConfigError, load_model_config, read_json
from keye.errors import KeyeError
from keye.files import complete_file
from keye.models.keye import KeyeModel
from keye.models.load import load_model, save_model
from keye.ops.elementwise import compile_elementwise
from keye.train.config import StageConfig, TrainConfig
from keye.train.optim import Optimizer
from keye.train.parallel import Group, processes
from keye.train.recipes.nano.batches import derived_seed
from keye.train.recipes.nano.initialise import fresh_model, number_tokens, order_numbers
from keye.train.recipes.nano.makers import BatchProcess, BatchService
from keye.train.stages import Stage, make_stage, trainable

STATE_FILE, PROGRESS_FILE, LOG_FILE = "resume/state.safetensors", "progress.json", "log.jsonl"
#: Files of the model folder that go along with the weights.
COMPANIONS = ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json",
              "tokenizer_config.json")  # fmt: skip

Report = Callable[[dict[str, Any]], None]


def train(config: TrainConfig, *, resume: bool = True, report: Report | None = None, decode: str | None = None) -> Path:
    """Runs every stage that is not done yet and returns the output folder, which is a loadable model.

    With `resume`, a run that was interrupted goes on at its last checkpoint; without, an existing output is an error.
    `decode` is the address of a decode service (`keye.cluster.service.open_service`) whose workers make the batches; on
    a cluster they read the tokenizer in the output folder, which must be on a disk that all nodes share.
    """
    fresh = _check_output(config, resume)
    load_model_config(config.model)  # a mistake there is told before anything is written
    config.output.mkdir(parents=True, exist_ok=True)
    try:
        with processes(config.processes, config.output, partial(_train, config, _silent, decode)) as group:
            _train(config, report or _silent, decode, group)
    except KeyeError:
        if fresh and not (config.output / PROGRESS_FILE).exists():
            shutil.rmtree(config.output)
        raise
    return config.output


def _check_output(config: TrainConfig, resume: bool) -> bool:
    """Whether the output folder is new; ConfigError where a run there would overwrite something."""
    out = config.output
    if not out.exists():
        return True
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; output must be a folder")
    if (out / PROGRESS_FILE).exists():
        if not resume:
            raise ConfigError(f"{out} already holds a run; resume it or choose another output")
    else:
        _check_unused(config)
    return False


def _check_unused(config: TrainConfig) -> None:
    """ConfigError where a folder without a run has files that one would change. What a run that was killed early leaves
    is its own."""
    out = config.output
    if any(out.glob("model*.safetensors*")):
        raise ConfigError(f"{out} holds a model that is no run's output; choose another output so that it is kept")
    for name in COMPANIONS:
        ours, theirs = config.model / name, out / name
        if theirs.exists() and ours.exists() and ours.read_bytes() != theirs.read_bytes():
            raise ConfigError(f"{theirs} is of no run; choose another output so that it is kept")
    if (log := out / LOG_FILE).exists() and not _is_log(log):
        raise ConfigError(f"{log} is of no run; choose another output so that it is kept")


def _is_log(path: Path) -> bool:
    """Whether a file begins with a record of a run."""
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    try:
        return {"stage", "step", "minutes"} <= json.loads(first or b"{}").keys()
    except (ValueError, AttributeError):
        return False


def _silent(figures: dict[str, Any]) -> None:
    """The report of a process that nobody watches."""


def _train(config: TrainConfig, report: Report, decode: str | None, group: Group) -> None:
    """Every stage that is not done yet, in one of the run's processes."""
    torch.set_num_threads(config.threads)
    run = Run(config, report, group, decode)
    try:
        for number in range(run.stage, len(config.stages)):
            run.train_stage(number)
    finally:
        run.close()


class Run:
    """One training run: the model, where it stands, and its files."""

    def __init__(self, config: TrainConfig, report: Report, group: Group, decode: str | None = None) -> None:
        self.config, self.report, self.group = config, report, group
        self.out = config.output
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self._state: dict[str, torch.Tensor] | None = None
        self.model = self._start()
        if config.fused:
            self._fuse()
        group.agree(0.0)  # nobody goes on before the files of the output folder are there
        self.makers: BatchProcess | BatchService = BatchProcess() if decode is None else BatchService(decode)

    def _start(self) -> KeyeModel:
        model_config = load_model_config(self.config.model)
        for name in COMPANIONS:
            if self.group.rank == 0 and (self.config.model / name).exists() and self.config.model != self.out:
                shutil.copyfile(self.config.model / name, self.out / name)
        if (self.out / PROGRESS_FILE).exists():
            self._set_progress(read_json(self.out / PROGRESS_FILE))
            self._restore()
            return load_model(self.out, model_config, dtype=torch.bfloat16)[0]
        if self.config.fresh:
            model = fresh_model(model_config, self.config.seed)
            order_numbers(model, number_tokens(Tokenizer.from_file(self.config.model)))
            return model.bfloat16()
        model, report = load_model(self.config.model, model_config, dtype=torch.bfloat16)
        if report.lacks_indexer:
            raise ConfigError(f"{self.config.model} has no indexer weights; start from a checkpoint that has them")
        return model

    def _fuse(self) -> None:
        if (fused := compile_elementwise(self.model.device)) is not None:
            self.model.set_elementwise(fused)
            return
        warnings.warn("no C++ compiler works here, so element-wise operations stay unfused and slower", stacklevel=2)

    def _restore(self) -> None:
        """Takes up the optimiser's state, unless it is a left-over of a stage that has ended since."""
        path = self.out / STATE_FILE
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("progress", self._progress()))
            if (saved["stage"], saved["step"]) < (self.stage, self.step):
                return
            self._set_progress(saved)
            self._state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _set_progress(self, progress: Mapping[str, Any]) -> None:
        self.stage, self.step, self.seconds = progress["stage"], progress["step"], progress["seconds"]
        names = [stage.name for stage in self.config.stages]
        begun = progress.get("names", names)[: self.stage + 1]
        if names[: len(begun)] != begun:
            raise ConfigError(f"{self.out} holds a run that began with the stages {', '.join(begun)}; keep these, or "
                              "choose another output")  # fmt: skip

    def _progress(self) -> str:
        names = [stage.name for stage in self.config.stages]
        return json.dumps({"stage": self.stage, "step": self.step, "seconds": self.seconds, "names": names})

    def close(self) -> None:
        self.makers.close()

    def train_stage(self, number: int) -> None:
        """Runs stage `number` to its end and saves."""
        config = self.config.stages[number]
        torch.manual_seed(derived_seed(self.config.seed, number, config.name, "heads"))
        stage = make_stage(config, self.model)
        optimizer = self._optimizer(config, stage)
        if self._state is not None:
            optimizer.load_state(self._state)
            self._state = None
        self.model.train()
        clock = Clock(config, self.step, self.seconds, self.config)
        norm = 0.0
        for batch in self._batches(number):
            progress = self.group.agree(clock.progress())
            if progress >= 1.0:
                break
            factor = schedule(config, clock.step, progress)
            # Every step has its own random numbers, so that a resumed run draws those of an uninterrupted one.
            torch.manual_seed(derived_seed(self.config.seed, number, config.name, "loss", clock.step, self.group.rank))
            loss = stage.loss(self.model, batch)
            loss.backward()
            norm = optimizer.step(config.lr * factor, config.adam_lr * factor)
            clock.tick()
            if self.group.rank == 0:
                if clock.log_due():
                    self._log(config, clock, stage, norm)
                if clock.save_due():
                    self._save(number, clock, optimizer)
        self.stage, self.step, self.seconds = number + 1, 0, 0.0
        if self.group.rank == 0:
            if clock.has_unlogged_steps():
                self._log(config, clock, stage, norm)
            save_model(self.model, self.out, dtype=torch.bfloat16)
            self._write_progress()
            (self.out / STATE_FILE).unlink(missing_ok=True)

    def _optimizer(self, config: StageConfig, stage: Stage) -> Optimizer:
        heads = [(f"heads.{name}", p) for name, p in stage.heads.named_parameters()]
        parameters = [*trainable(self.model, config), *heads]
        return Optimizer(parameters, is_muon_matrix, adam_scale=adam_scale, group=self.group,
                         weight_decay=config.weight_decay)  # fmt: skip

    def _batches(self, number: int) -> Iterator[Any]:
        """Batches of step, step + 1, ... made ahead in other processes."""
        waiting: deque[Future[Any]] = deque()
        config, step = self.config.stages[number], self.step
        while True:
            while len(waiting) < self.makers.ahead:
                seed = derived_seed(self.config.seed, number, config.name, step, self.group.rank)
                waiting.append(self.makers.submit(config, self.out, seed))
                step += 1
            yield waiting.popleft().result()

    def _log(self, config: StageConfig, clock: Clock, stage: Stage, norm: float) -> None:
        figures = {"stage": config.name, "step": clock.step, "minutes": round(clock.seconds() / 60, 2),
                   "steps_per_second": round(clock.rate(), 3), "grad_norm": rounded(norm),
                   **{name: rounded(value) for name, value in stage.figures.take().items()}}  # fmt: skip
        with (self.out / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        self.report(figures)

    def _save(self, number: int, clock: Clock, optimizer: Optimizer) -> None:
        self.stage, self.step, self.seconds = number, clock.step, clock.seconds()
        save_model(self.model, self.out, dtype=torch.bfloat16)
        # The state knows its own step: a run that is killed between the two files goes on from where the state is.
        path = self.out / STATE_FILE
        path.parent.mkdir(exist_ok=True)
        with complete_file(path) as draft:
            save_file(optimizer.state(), draft, metadata={"progress": self._progress()})
        self._write_progress()

    def _write_progress(self) -> None:
        with complete_file(self.out / PROGRESS_FILE) as draft:
            draft.write_text(self._progress())


class Clock:
    """Steps and seconds of a stage, those before a resume included."""

    def __init__(self, stage: StageConfig, step: int, seconds: float, run: TrainConfig) -> None:
        self.stage, self.step, self.run = stage, step, run
        self._before, self._begin = seconds, time.monotonic()
        self._logged, self._saved, self._logged_step = self._begin, self._begin, step

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begin

    def progress(self) -> float:
        """0 at the start of the stage, 1 when its steps or minutes are used up."""
        shares = [0.0]
        if self.stage.steps is not None:
            shares.append(self.step / max(1, self.stage.steps))
        if self.stage.minutes is not None:
            shares.append(self.seconds() / 60 / self.stage.minutes)
        return max(shares)

    def tick(self) -> None:
        self.step += 1

    def rate(self) -> float:
        """Steps a second since the last call."""
        now = time.monotonic()
        rate = (self.step - self._logged_step) / max(1e-9, now - self._logged)
        self._logged, self._logged_step = now, self.step
        return rate

    def has_unlogged_steps(self) -> bool:
        """Whether a step was made since the last record of the log."""
        return self.step > self._logged_step

    def log_due(self) -> bool:
        return time.monotonic() - self._logged >= self.run.log_seconds

    def save_due(self) -> bool:
        by_steps = self.run.save_steps is not None and self.step % self.run.save_steps == 0
        if not by_steps and time.monotonic() - self._saved < self.run.save_minutes * 60:
            return False
        self._saved = time.monotonic()
        return True


def rounded(value: float) -> float | None:
    """A figure of the log with four significant digits; None where it is not finite, which JSON cannot write."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def schedule(config: StageConfig, step: int, progress: float) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear decay over the last `decay_fraction` of the stage."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (1.0 - progress) / max(1e-9, config.decay_fraction)
    return warmup * max(config.final_lr, min(1.0, left))


def adam_scale(name: str) -> float:
    """The head learns at a tenth of the rate: AdamW gives rare tokens steps as large as common ones, and their rows
    would drift away from the embeddings that they copy."""
    return 0.1 if name == "lm_head.weight" else 1.0


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices follow Muon; embeddings, heads, routers, indexers, patch and position tables follow AdamW."""
    other = ("embed", "lm_head", "heads.", ".mlp.gate.", ".sa_indexer.", "norm")
    return parameter.ndim in (2, 3) and not any(part in name for part in other)
