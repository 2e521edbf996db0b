"""What a training run is, as TOML: a model to start from, and stages to run one after another.

A recipe extends these models by tables of its own; what is here holds for every recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from keye.config.settings import Settings

#: What a stage changes: "vision" (tower and projector), "decoder" (everything but the tower and the indexers; with
#: sparse attention the indexers too), "indexer", or "all".
Trains = Literal["vision", "decoder", "all", "indexer"]
#: `dense`: ordinary attention. `warmup`: the same, plus the indexer's KL against it over all causal keys.
#: `sparse`: attention over the selected keys, plus the KL over that set.
TrainMode = Literal["dense", "warmup", "sparse"]

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class StageConfig(Settings):
    """One stage. It ends after `steps` steps or `minutes` minutes, whichever is set (and reached) first."""

    name: str
    steps: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    trains: Trains = "decoder"
    """The part that changes: vision (tower and projector), decoder (all but the tower and, with dense attention, the
    indexers), indexer, or all."""
    attention: TrainMode = "dense"
    """How the decoder attends: dense, warmup (dense, with only the indexer's KL), sparse (over the selected keys, with
    the indexer's KL)."""
    lr: float = Field(default=2e-3, gt=0)
    """Learning rate of matrices (Muon)."""
    adam_lr: float = Field(default=2e-3, gt=0)
    """Learning rate of everything else (AdamW)."""
    warmup_steps: int = Field(default=50, ge=0)
    decay_fraction: Share = 0.3
    """Share of the stage over which the learning rates fall to `final_lr` of their value."""
    final_lr: Share = 0.02
    balance: Weight = 0.01
    """Weight of the loss that spreads tokens over the experts."""
    indexer_kl: Weight = 1.0
    weight_decay: Weight = 0.02

    def share_done(self, step: int, minutes: float) -> float:
        """How much of the stage is done after so many steps and minutes: 0 at its start, 1 at its end."""
        shares = (step / self.steps if self.steps else 0.0, minutes / self.minutes if self.minutes else 0.0)
        return max(shares)

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.steps is None and self.minutes is None:
            raise ValueError(f"stage {self.name!r} needs steps or minutes")
        if self.attention == "warmup" and self.trains != "indexer":
            raise ValueError('attention = "warmup" trains the indexer alone; set trains = "indexer"')
        if self.trains == "indexer" and self.attention == "dense":
            raise ValueError('dense attention gives the indexer nothing to learn; set attention = "warmup"')
        return self


class TrainConfig(Settings):
    """A run. Relative paths are relative to the file's folder."""

    recipe: str
    """Where batches and losses come from: nano."""
    model: Path = Field(strict=False)
    """A folder whose config.json (and, unless `fresh`, weights) the run starts from."""
    output: Path = Field(strict=False)
    stages: tuple[StageConfig, ...] = Field(validation_alias="stage", min_length=1, strict=False)
    fresh: bool = False
    """Begin with new weights."""
    seed: int = 0
    device: str = "cpu"
    """Where the model is trained: cpu, cuda, cuda:1, ..."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the weights in forward and backward passes; the optimizer keeps float32 copies."""
    threads: int = Field(default=1, gt=0)
    """Processor threads of each process."""
    processes: int = Field(default=1, gt=0)
    """Processes that share a step, each with a batch of its own."""
    fused: bool = True
    """Compile element-wise operations."""
    save_minutes: float = Field(default=5.0, gt=0)
    save_steps: int | None = Field(default=None, gt=0)
    """Save also every so many steps."""
    log_seconds: float = 30.0

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two stages are named {twice[0]!r}; give each a name of its own")
        if self.processes > 1 and self.device != "cpu":
            raise ValueError(f"processes is {self.processes}, but several processes train on the cpu only; set it to 1")
        return self
