"""The training loop: stages one after another, batches made ahead, logs, checkpoints that can be resumed.

It knows no recipe: `keye.train.recipe` says what a recipe brings.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keye.config import ConfigError, load_model_config
from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.models.load import load_model, torch_dtype
from keye.models.quant_fill import quantized_weights
from keye.ops.elementwise import PLAIN, Elementwise, compile_elementwise
from keye.ops.registry import find_training_elementwise
from keye.process import check_device, release_memory, set_threads
from keye.train.batches import BatchProcess, StepBatch, derived_seed
from keye.train.checkpoint import FOLDER, Checkpoints, Progress
from keye.train.config import StageConfig, TrainConfig
from keye.train.guard import Guard
from keye.train.interrupt import Interrupt
from keye.train.mesh import Mesh
from keye.train.metrics import Meter, round_figure
from keye.train.optim import Optimizer, Trained, highest_rate
from keye.train.output import LOG_FILE, begin_output, check_output, lock_output
from keye.train.parallel import Group, device_of, mean_figures, processes
from keye.train.recipe import Objective, Recipe, move_batch
from keye.train.renew import renew_parts

Report = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig, recipe: Recipe, *, resume: bool = True, report: Report | None = None, decode: str | None = None
) -> Path:
    """Runs every stage that is not done yet and returns the output folder, which is a loadable model.

    With `resume`, a run that was interrupted goes on at its last checkpoint; without, an existing output is an error.
    Ctrl-C in a stage ends the step, saves and raises `KeyboardInterrupt`; pressed again, it ends the run at once.
    `decode` is the address of a decode service (`keye.cluster.service.open_service`) whose workers make the batches; on
    a cluster they read the tokenizer in the output folder, which must be on a disk that all nodes share.
    """
    check_device(config.device)
    with processes(config.processes, config.device, partial(_train, config, recipe, resume, None, decode)) as group:
        _train(config, recipe, resume, report, decode, group)
    return config.output


def _train(
    config: TrainConfig, recipe: Recipe, resume: bool, report: Report | None, decode: str | None, group: Group
) -> None:  # fmt: skip
    """Every stage that is not done yet, in one of the run's processes."""
    set_threads(config.threads)
    load_model_config(config.model)  # a mistake there is reported before anything is written
    is_new = group.first(partial(check_output, config, resume))
    lock = lock_output(config.output)
    group.first(lock.__enter__)
    try:
        with Run(config, recipe, report, group, decode) as run:
            for number in range(run.progress.stage, len(config.stages)):
                run.train_stage(number)
    except KeyeError:
        if group.rank == 0 and is_new and not (config.output / FOLDER).exists():
            shutil.rmtree(config.output)
        raise
    finally:
        if group.rank == 0:
            lock.__exit__(None, None, None)


class Run:
    """One training run: the model, how far it is, and its files."""

    def __init__(
        self, config: TrainConfig, recipe: Recipe, report: Report | None, group: Group, decode: str | None
    ) -> None:
        self.config, self.recipe, self.report, self.group, self.decode = config, recipe, report, group, decode
        self.out, self.dtype = config.output, torch_dtype(config.dtype)
        self.device = device_of(group, config.device)
        self.batches, self.interrupt = BatchProcess(), Interrupt()
        self.checkpoints = Checkpoints(self.out, [stage.name for stage in config.stages], config.keep or 1, group)
        try:
            self.progress = self.checkpoints.newest()
            group.first(partial(begin_output, config))
            model, device = load_model_config(config.model), torch.device(self.device)
            self.mesh = Mesh(config.parallel, group, model, device, config.shards)
            self.model = self._load_model()
        except BaseException:
            self.close()
            raise
        self.meter = Meter(self.model, group, config, self.mesh.mates)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what works in the background."""
        self.batches.close()
        self.checkpoints.close()

    def _load_model(self) -> KeyeModel:
        """The model as the run has left it, or as it begins."""
        has_weights = any(self.out.glob("model*.safetensors"))
        folder = self.out if has_weights else self.config.model
        config = load_model_config(folder)
        if self.config.fresh and not has_weights:
            model = self.recipe.create_model(config, self.config.model, self.config.seed)
            model = model.to(device=self.device, dtype=self.dtype)
        else:
            quant = self.config.quant
            model, report = load_model(folder, config, device=self.device, dtype=self.dtype, quant=quant)
            if quantized_weights(model) and self.config.lora is None:
                raise ConfigError(f"{folder} is quantised and cannot be trained; train an adapter ([lora]), or start "
                                  "from the model it was made of")  # fmt: skip
            if report.lacks_indexer and "indexer" not in self.config.renews:
                raise ConfigError(f'{folder} has no indexer weights; set renews = ["indexer"], or start from a model '
                                  "that has them")  # fmt: skip
            if not has_weights:
                renew_parts(model, config, self.config.renews, self.config.seed)
        self.recipe.begin_run(model, self.config)
        model.set_elementwise(self._choose_elementwise(model))
        model.set_recompute(self.config.checkpointing)
        self.mesh.divide(model)
        return model

    def _choose_elementwise(self, model: KeyeModel) -> Elementwise:
        """The small operations: those of inference with gradients by the compiled core; else, where `fused` asks for
        it, those that torch compiles, whose last bits may differ."""
        elementwise = find_training_elementwise(model.device, model.config.text.hidden_size)
        if elementwise is not PLAIN or not self.config.fused:
            return elementwise
        fused = compile_elementwise(model.device)
        if fused is None:
            text = "no C++ compiler works here, so element-wise operations stay unfused and slower"
            warnings.warn(text, stacklevel=2)
        return fused or PLAIN

    def train_stage(self, number: int) -> None:
        """Runs stage `number` to its end and saves."""
        stage, resumed = self.config.stages[number], self.progress
        seed = derived_seed(self.config.seed, number, stage.name)
        is_resumed = resumed.step > 0 or resumed.ended
        torch.manual_seed(derived_seed(self.config.seed, number, stage.name, "heads"))
        self._note(stage, self.recipe.begin_stage(stage, self.model, self.out, seed=seed, resumed=is_resumed))
        objective = self.recipe.make_objective(stage, self.model)
        objective.heads.to(self.model.device)
        optimizer = self._make_optimizer(stage, objective)
        if is_resumed:
            state = optimizer.state()
            self.checkpoints.load(resumed, state)
            optimizer.take_state(state)
        if not resumed.ended:
            with self.interrupt.listening():
                self._run_steps(number, objective, optimizer)
        self._note(stage, self.recipe.end_stage(stage, self.model, self.out))
        self._save_model()
        self.progress = resumed.next_stage()
        self.checkpoints.save(self.progress, None, wait=True)

    def _make_optimizer(self, stage: StageConfig, objective: Objective) -> Optimizer:
        rate = highest_rate(stage, "heads", is_matrix=False)
        heads = [Trained(f"heads.{name}", p, False, rate) for name, p in objective.heads.named_parameters()]
        trained = [*self.recipe.prepare(self.model, stage), *heads]
        betas = (0.9, 0.95) if stage.optimizer == "adamw" else (0.9, 0.97)
        return Optimizer(trained, objective.heads.named_buffers(), group=self.group, betas=betas,
                         weight_decay=stage.weight_decay, clip=stage.clip)  # fmt: skip

    def _run_steps(self, number: int, objective: Objective, optimizer: Optimizer) -> None:
        """The steps of a stage, with the last of which its last checkpoint is written."""
        stage, resumed = self.config.stages[number], self.progress
        seed = derived_seed(self.config.seed, number, stage.name)
        places = {"rank": self.mesh.data_rank, "size": self.mesh.data_size}
        source = partial(self.recipe.open_batches, stage, self.out.absolute(), seed=seed, state=resumed.data,
                         decode=self.decode, **places)  # fmt: skip
        self.batches.open(f"{number} {stage.name}", source)
        self.model.train()
        clock, guard = Clock(resumed, self.config), Guard(self.config.guard, resumed.guard)
        step = Step(self, number, objective, optimizer, guard)
        done, share, data = 0.0, 0.0, resumed.data
        while True:
            wanted = (*clock.due(), float(self.interrupt.is_requested))
            done = max(stage.share_done(clock.step, clock.seconds() / 60), share)
            logs, saves, ends, done = self.group.agree(*wanted, done)
            if logs:
                self._log(stage, clock, step, done)
            if saves or ends:
                progress = Progress(number, clock.step, clock.seconds(), False, data, guard.state())
                self._save(progress, optimizer, Clock.WITH_MODEL if ends else saves)
            if ends:
                self.checkpoints.wait()
                raise KeyboardInterrupt
            if done >= 1.0:
                break
            with self.meter.waiting():
                batch = self.batches.next()
            if batch is None:
                break
            share, done = batch.share, max(done, batch.share)
            step.take(batch, clock.step, stage.lr_factor(clock.step, done))
            clock.step, data = clock.step + 1, batch.state
            if stage.eval_steps and clock.step % stage.eval_steps == 0:
                self._validate(stage, objective)
        if clock.step > clock.logged_step:
            self._log(stage, clock, step, 1.0)
        ended = Progress(number, clock.step, clock.seconds(), True)
        self.checkpoints.save(ended, optimizer.state(), wait=True)

    def _validate(self, stage: StageConfig, objective: Objective) -> None:
        """Logs the loss of held-out data, where there are any."""
        places = {"rank": self.mesh.data_rank, "size": self.mesh.data_size}
        source = self.recipe.open_validation(stage, self.out, **places)
        if source is None:
            return
        total, count, figures = 0.0, 0.0, objective.figures
        objective.figures = type(figures)()
        self.model.eval()
        try:
            with torch.no_grad():
                while (batch := source.next()) is not None:
                    for micro in batch.micro:
                        moved = self.mesh.keep_own_labels(move_batch(micro, self.model.device))
                        with self.mesh.gathered(self.model):
                            total += float(objective.loss(self.model, moved, 1.0))
                    count += batch.count
        finally:
            source.close()
            held_out = mean_figures(self.group, objective.figures.sums())
            objective.figures = figures
            self.model.train()
        (total,) = self.group.total(total)
        more = {f"val_{name}": value for name, value in held_out.items() if name != "loss"}
        self._note(stage, {"val_loss": total / count, **more} if count else {})

    def _log(self, stage: StageConfig, clock: Clock, step: Step, done: float) -> None:
        figures = mean_figures(self.group, step.objective.figures.sums())
        rates = self.meter.take(clock.step - clock.logged_step)
        first = {"step": clock.step, "minutes": round(clock.seconds() / 60, 2), "lr": step.rate()}
        left = {"seconds_left": round(clock.seconds() * (1 - done) / done)} if 0 < done < 1 else {}
        clock.mark_logged()
        release_memory()
        self._note(stage, {**first, **figures, "grad_norm": step.norm, **rates, **step.guard.take(), **left})

    def _note(self, stage: StageConfig, figures: Mapping[str, float]) -> None:
        """Adds a line to the log."""
        if self.group.rank > 0 or not figures:
            return
        line = {"stage": stage.name, **{name: round_figure(value) for name, value in figures.items()}}
        with (self.out / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.report is not None and "step" in line:
            self.report(line)

    def _save(self, progress: Progress, optimizer: Optimizer, how: float) -> None:
        self.checkpoints.save(progress, optimizer.state())
        if how == Clock.WITH_MODEL:
            self._save_model()

    def _save_model(self) -> None:
        """Writes the loadable model."""
        tensors = self.mesh.gather_state(self.model)
        if self.group.rank == 0:
            self.recipe.save(self.model, tensors, self.out, self.dtype)
        self.group.agree(0.0)


class Step:
    """One step after another: micro-batches, the guard, the update."""

    def __init__(self, run: Run, number: int, objective: Objective, optimizer: Optimizer, guard: Guard) -> None:
        self.run, self.number, self.objective, self.optimizer, self.guard = run, number, objective, optimizer, guard
        self.stage, self.norm, self._factor = run.config.stages[number], 0.0, 0.0

    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.stage.lr * self._factor

    def take(self, batch: StepBatch, step: int, factor: float) -> None:
        """Learns from a batch."""
        run, loss, self._factor = self.run, 0.0, factor
        # Every step has its own random numbers, so that a resumed run draws those of an uninterrupted one.
        parts = (run.config.seed, self.number, self.stage.name, "loss", step)
        torch.manual_seed(derived_seed(*parts, run.mesh.data_rank))
        try:
            for micro in batch.micro:
                with run.mesh.gathered(run.model) as anchor:
                    moved = run.mesh.keep_own_labels(move_batch(micro, run.model.device))
                    part = self.objective.loss(run.model, moved, batch.count)
                    loss += float(part.detach())
                    if (total := part + anchor + run.mesh.anchor()).requires_grad:  # texts teach a projector nothing
                        total.backward()
                self.optimizer.add_gradients()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise out_of_memory(run.device, batch) from error
            raise
        run.meter.count(batch.figures)
        self.objective.finish_step(run.group.sum)
        self.norm = self.optimizer.reduce()
        (loss,) = run.group.total(loss)
        if self.guard.accepts(loss, self.norm, f"{self.stage.name}, step {step + 1}"):
            self.optimizer.update(factor, self.norm)
        self.optimizer.clear()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the processor had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def out_of_memory(device: str, batch: StepBatch) -> KeyeError:
    """The sentence for a step that did not fit."""
    tokens = batch.figures.get("tokens")
    size = "" if tokens is None else f" of {int(tokens):,} tokens"
    room = ""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        room = f": {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB were in use"
    return KeyeError(f"a step{size} does not fit in the memory of {device}{room}; lower max_tokens or the batch, set "
                     "checkpointing = true, or divide the model among more processes ([parallel])")  # fmt: skip


class Clock:
    """Steps and seconds of a stage, those before a resume included."""

    #: What is due: a checkpoint alone, or the loadable model with it.
    CHECKPOINT, WITH_MODEL = 1.0, 2.0

    def __init__(self, progress: Progress, run: TrainConfig) -> None:
        self.step, self.run, self._first = progress.step, run, progress.step
        self._before, self._begin = progress.seconds, time.monotonic()
        self._logged, self._saved, self.logged_step = self._begin, self._begin, self.step

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begin

    def mark_logged(self) -> None:
        self._logged, self.logged_step = time.monotonic(), self.step

    def due(self) -> tuple[float, float]:
        """Whether to log (0 or 1), and what to save (0: nothing); what is to be saved counts as saved from now on."""
        if self.step == self._first:
            return 0.0, 0.0
        logs = self.step > self.logged_step and time.monotonic() - self._logged >= self.run.log_seconds
        saves = 0.0
        if time.monotonic() - self._saved >= self.run.save_minutes * 60:
            saves, self._saved = self.WITH_MODEL, time.monotonic()
        elif self.run.save_steps is not None and self.step % self.run.save_steps == 0:
            saves = self.CHECKPOINT
        return float(logs), saves
