"""The tables of keye-nano's recipe: what its batches hold and which helper losses it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from keye.config.settings import Settings
from keye.data.frameforge import SPLITS, TASKS, TRACED_TASKS
from keye.data.frameforge.scene import MAX_OBJECTS
from keye.train.config import Share, StageConfig, TrainConfig, Weight


class Mix(Settings):
    """One kind of batch: `clips` videos of `frames` frames with `questions` questions each."""

    frames: int = Field(gt=0)
    clips: int = Field(gt=0)
    questions: int = Field(gt=0)
    weight: float = Field(default=1.0, gt=0)
    """How often this kind is drawn, relative to the others."""
    text_chance: Share | None = None
    """Replaces the stage's where it is set; windows have a share of their own."""
    scene: Literal["clip", "window", "close"] = "clip"
    """clip: `make_clip`; window, close: what a search looks at (`make_window`), in any aspect ratio."""
    pictures: bool = False
    """Ask about the first frame alone, as an image prompt without times; `frames` is 1 then."""

    @model_validator(mode="after")
    def _check(self) -> Mix:
        if self.pictures and self.frames != 1:
            raise ValueError(f"frames is {self.frames}, but pictures are single frames; set frames = 1")
        if self.pictures and self.scene != "clip":
            raise ValueError(f'scene is "{self.scene}", but pictures are frames of clips; set scene = "clip"')
        return self


class AutoRule(Settings):
    """Questions that are worth thinking about."""

    task: str
    frames: int = Field(default=1, gt=0)
    """Fewest frames of the clip."""
    items: int = Field(default=1, gt=0)
    """Fewest things that the reasoning lists."""

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: str) -> str:
        if task not in TRACED_TASKS:
            raise ValueError(f"{task!r} has no reasoning; choose {', '.join(TRACED_TASKS)}")
        return task


class NanoTable(Settings):
    """What a stage learns from FrameForge. Helper losses are described in `keye.train.recipes.nano.helpers`."""

    kind: Literal["vision", "language"] = "language"
    """vision: dense labels of single frames; language: questions about clips."""
    batch: int = Field(default=48, gt=0)
    """Images in a step of kind vision."""
    mix: tuple[Mix, ...] = Field(default=(), strict=False)
    """The kinds of batches of kind language."""
    objects: int = Field(default=4, ge=1, le=MAX_OBJECTS)
    """At most so many objects in a clip."""
    split: str = "train"
    text_chance: Share = 0.4
    """Share of clips that show text."""
    plain_times: Share = 0.0
    """Share of clips that start at 0 seconds with two frames a second."""
    task_weights: dict[str, Weight] = Field(default_factory=dict)
    """How often a task is asked about, relative to the others."""
    thinking: Share = 0.0
    """Share of the questions that are asked in a thinking mode: most of those that reasoning helps are answered after
    it, the others have the opening that asks for none."""
    auto: tuple[AutoRule, ...] = Field(default=(), strict=False)
    """Questions that are reasoned about where the prompt does not say whether to."""
    time_binding: Weight = 0.0
    """Weight of the helper loss by which tokens of a frame name its time."""
    pointing: Weight = 0.0
    """Weight of the helper loss by which attention heads look where the evidence lies."""
    events: Weight = 0.0
    """Weight of the helper loss by which the token after a frame says what is shown and what has changed."""
    tracking: Weight = 0.0
    """Weight of the helper loss by which questions know where their object is, how it moves, how big it is and whether
    it comes back, and by which the token after a frame says what has come back and whether the background changes."""

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str) -> str:
        if split not in SPLITS:
            raise ValueError(f"{split!r} is not a split; choose {', '.join(SPLITS)}")
        return split

    @field_validator("task_weights")
    @classmethod
    def _check_tasks(cls, weights: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(set(weights) - set(TASKS)):
            raise ValueError(f"unknown tasks {', '.join(unknown)}; known are {', '.join(TASKS)}")
        return weights

    @model_validator(mode="after")
    def _check(self) -> NanoTable:
        if self.kind == "language" and not self.mix:
            raise ValueError('kind = "language" needs a mix, e.g. mix = [{frames = 8, clips = 6, questions = 12}]')
        return self


class NanoStage(StageConfig):
    """A stage of keye-nano's recipe."""

    moved: ClassVar[Mapping[str, str]] = {name: f"write {name} under [stage.nano]" for name in NanoTable.model_fields}

    nano: NanoTable

    @model_validator(mode="after")
    def _check_nano(self) -> NanoStage:
        if self.nano.kind == "vision" and self.trains != "vision":
            raise ValueError('kind = "vision" trains the vision tower alone; set trains = "vision"')
        return self


class NanoConfig(TrainConfig):
    """A run with `recipe = "nano"`."""

    recipe: Literal["nano"]
    stages: tuple[NanoStage, ...] = Field(validation_alias="stage", min_length=1, strict=False)

    @model_validator(mode="after")
    def _check_parallel(self) -> NanoConfig:
        for name in ("context", "tensor"):
            if getattr(self.parallel, name) > 1:
                raise ValueError(f'parallel.{name} divides next tokens alone; leave it out with recipe = "nano"')
        return self
