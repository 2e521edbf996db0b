"""What a training run is, as TOML: a model to start from and stages to run one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from keye.config import ConfigError
from keye.config.toml import build, check_keys, check_types, is_number, read_toml
from keye.data.frameforge import SPLITS, TASKS
from keye.data.frameforge.scene import MAX_OBJECTS

StageKind = Literal["vision", "language"]
Trains = Literal["vision", "decoder", "all", "indexer"]
TrainMode = Literal["dense", "warmup", "sparse"]


@dataclass(frozen=True)
class Mix:
    """One kind of batch: `clips` videos of `frames` frames with `questions` questions each, drawn with `weight`.

    `text_chance`, where it is set, replaces the stage's: the share of clips that show text. `pictures` asks about the
    first frame alone, as an image prompt without times; `frames` is 1 then.
    """

    frames: int
    clips: int
    questions: int
    weight: float = 1.0
    text_chance: float | None = None
    pictures: bool = False

    def __post_init__(self) -> None:
        check_types(self, "mix")
        if self.pictures and self.frames != 1:
            raise ConfigError(f"mix: frames is {self.frames}, but pictures are single frames; set frames = 1")
        for name in ("frames", "clips", "questions", "weight"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"mix: {name} is {getattr(self, name)}; it must be above 0")
        _check_shares(self, "mix", "text_chance")


@dataclass(frozen=True)
class StageConfig:
    """One stage. It ends after `steps` steps or `minutes` minutes, whichever is set (and reached) first.

    kind "vision" pre-trains the vision tower on dense labels of single frames (`batch` images a step). kind "language"
    trains on questions about clips; `attention` says how the decoder attends ("dense", "warmup": dense with only the
    indexer's KL, "sparse": over the selected keys with NTP and KL). `trains` names the part that changes: "vision"
    (tower and projector), "decoder" (everything but the tower and the indexers), "indexer", or "all".

    `time_binding`, `pointing` and `events` weigh helper losses, whose heads are thrown away: tokens of a frame name its
    time; attention heads look where the evidence lies; the token after a frame says what it shows, what has appeared
    and what has vanished. See `keye.train.recipes.nano.helpers`.
    """

    name: str
    kind: StageKind = "language"
    steps: int | None = None
    minutes: float | None = None
    trains: Trains = "decoder"
    attention: TrainMode = "dense"
    lr: float = 2e-3
    adam_lr: float = 2e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    final_lr: float = 0.02
    batch: int = 48
    mix: tuple[Mix, ...] = ()
    objects: int = 4
    split: str = "train"
    text_chance: float = 0.4
    plain_times: float = 0.0
    task_weights: Mapping[str, float] = field(default_factory=dict)
    time_binding: float = 0.0
    pointing: float = 0.0
    events: float = 0.0
    balance: float = 0.01
    indexer_kl: float = 1.0
    weight_decay: float = 0.02

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        check_types(self, where)
        _check_shares(self, where, "text_chance", "plain_times", "decay_fraction", "final_lr")
        if self.split not in SPLITS:
            raise ConfigError(f"{where}: split is {self.split!r}; choose {', '.join(SPLITS)}")
        if not 1 <= self.objects <= MAX_OBJECTS:
            raise ConfigError(f"{where}: objects is {self.objects}; choose 1 to {MAX_OBJECTS}")
        for name in ("time_binding", "pointing", "events", "balance", "indexer_kl", "weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{where}: {name} is {getattr(self, name)}; it must not be negative")
        if self.steps is None and self.minutes is None:
            raise ConfigError(f"{where} needs steps or minutes")
        for name, kinds in (("kind", StageKind), ("trains", Trains), ("attention", TrainMode)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{where}: {name} is {getattr(self, name)!r}; choose {', '.join(get_args(kinds))}")
        for name in ("steps", "minutes", "batch", "lr", "adam_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{where}: {name} is {value}; it must be above 0")
        if self.kind == "vision" and self.trains != "vision":
            raise ConfigError(f'{where}: kind = "vision" trains the vision tower alone; set trains = "vision"')
        if self.kind == "language" and not self.mix:
            raise ConfigError(f"{where} needs a mix, e.g. mix = [{{frames = 8, clips = 6, questions = 12}}]")
        if self.attention == "warmup" and self.trains != "indexer":
            raise ConfigError(f'{where}: attention = "warmup" trains the indexer alone; set trains = "indexer"')
        if self.trains == "indexer" and self.attention == "dense":
            raise ConfigError(f'{where}: dense attention gives the indexer nothing to learn; set attention = "warmup"')
        if unknown := sorted(set(self.task_weights) - set(TASKS)):
            raise ConfigError(f"{where}: unknown tasks {', '.join(unknown)}; known are {', '.join(TASKS)}")
        if wrong := [task for task, weight in self.task_weights.items() if not (is_number(weight) and weight >= 0)]:
            raise ConfigError(
                f"{where}: the weight of {wrong[0]} in task_weights must be a number that is not negative"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A run: `model` is a folder whose config.json (and, unless `fresh`, weights) it starts from.

    It is saved every `save_minutes` minutes, and also every `save_steps` steps where that is set. `processes` share a
    step, each with a batch of its own and `threads` threads.
    """

    model: Path
    output: Path
    stages: tuple[StageConfig, ...]
    fresh: bool = False
    seed: int = 0
    threads: int = 1
    processes: int = 1
    fused: bool = True
    save_minutes: float = 5.0
    save_steps: int | None = None
    log_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_types(self, "the run")
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two stages are named {twice[0]!r}; give each a name of its own")
        for name in ("threads", "processes", "save_minutes", "save_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")


def load_train_config(path: Path) -> TrainConfig:
    """Reads a TOML file; relative `model` and `output` are relative to the file's folder. Unknown keys are errors."""
    raw = read_toml(path, "a training configuration such as configs/nano.toml")
    stages = tuple(_stage(item, path) for item in _tables(raw.pop("stage", []), f"{path}: stage"))
    if not stages:
        raise ConfigError(f"{path} has no [[stage]]; a run needs at least one")
    check_keys(raw, TrainConfig, str(path))
    for key in ("model", "output"):
        if key not in raw:
            raise ConfigError(f"{path} lacks {key!r}")
        if not isinstance(raw[key], str):
            raise ConfigError(f"{path}: {key} is {raw[key]!r}; it must be a path in quotes")
        raw[key] = (path.parent / raw[key]).resolve()
    return build(TrainConfig, {**raw, "stages": stages}, str(path))


def _stage(raw: dict[str, Any], path: Path) -> StageConfig:
    where = f"{path}, stage {raw.get('name', '?')!r}"
    check_keys(raw, StageConfig, where)
    mix = []
    for item in _tables(raw.get("mix", []), where + ": mix"):
        check_keys(item, Mix, where + ", mix")
        mix.append(build(Mix, item, where + ", mix"))
    return build(StageConfig, {**raw, "mix": tuple(mix)}, where)


def _check_shares(config: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name} is {value}; it must lie between 0 and 1")


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{where} must be a list of tables")
    return value
