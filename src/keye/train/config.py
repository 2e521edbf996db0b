"""What a training run is, as TOML: a model to start from, and stages to run one after another.

A recipe extends these models by tables of its own; what is here holds for every recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from keye.config.settings import Settings

#: What `trains` and `freezes` name; everything else there is a pattern of parameter names. "vision" is the tower and
#: the projector, "decoder" everything but these and, with dense attention, the indexers; "head" and "embeddings" are
#: one matrix where a model ties them.
PARTS = ("all", "vision", "tower", "projector", "decoder", "embeddings", "attention", "experts", "router", "dense",
         "indexer", "norms", "head")  # fmt: skip
#: `dense`: ordinary attention. `warmup`: the same, plus the indexer's KL against it over all causal keys.
#: `sparse`: attention over the selected keys, plus the KL over that set.
TrainMode = Literal["dense", "warmup", "sparse"]

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
#: A name of layers, or its end: PEFT takes it for a regular expression, in which nothing of it has a meaning.
LayerName = Annotated[str, Field(pattern=r"^[\w.]+$")]
Rank = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class StageConfig(Settings):
    """One stage. It ends after `steps` steps, `minutes` minutes or `epochs` passes over its data, whichever is set
    (and reached) first."""

    name: str
    steps: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    trains: str | Names = "decoder"
    """What changes: a part or a list of parts (all, vision, tower, projector, decoder, embeddings, attention, experts,
    router, dense, indexer, norms, head) or of patterns of parameter names, such as "model.layers.3.*"."""
    freezes: str | Names = ()
    """Parts or patterns of what `trains` names that stay as they are nevertheless."""
    attention: TrainMode = "dense"
    """How the decoder attends: dense, warmup (dense, with only the indexer's KL), sparse (over the selected keys, with
    the indexer's KL)."""
    accumulation: int = Field(default=1, gt=0)
    """Micro-batches of each process in a step; their gradients are added up."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices at `lr`, AdamW for the rest at `adam_lr`. adamw: AdamW for everything at `lr`."""
    lr: Rate = 2e-3
    """Highest learning rate: of matrices with Muon, of everything with AdamW."""
    adam_lr: Rate = 2e-3
    """Learning rate of everything that Muon does not take."""
    vision_lr: Rate | None = None
    """Learning rate of the vision tower instead of the two."""
    projector_lr: Rate | None = None
    """Learning rate of the projector instead of the two."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps over which the learning rates rise in the beginning."""
    warmup_fraction: Share = 0.0
    """Share of the stage over which they rise, where that is longer."""
    decay: Literal["linear", "cosine"] = "linear"
    """How the learning rates fall over the last `decay_fraction` of the stage, to `final_lr` of their value."""
    decay_fraction: Share = 0.3
    final_lr: Share = 0.02
    weight_decay: Weight = 0.02
    clip: Rate = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
    balance: Weight = 0.01
    """Weight of the loss that spreads tokens over the experts."""
    router_z: Weight = 0.0
    """Weight of the loss that keeps the router's logits small."""
    indexer_kl: Weight = 0.5
    """lambda, the weight of the indexer's KL: the mean over queries and layers of its sum over the G groups of key
    heads. Against one teacher, all heads averaged, the same gradient has the weight G * lambda."""
    eval_steps: int | None = Field(default=None, gt=0)
    """Measure the loss of held-out data every so many steps, and at the end."""

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """`trains` as a tuple."""
        return (self.trains,) if isinstance(self.trains, str) else self.trains

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """`freezes` as a tuple."""
        return (self.freezes,) if isinstance(self.freezes, str) else self.freezes

    def share_done(self, step: int, minutes: float, epochs: float = 0.0) -> float:
        """How much of the stage is done after so many steps, minutes and passes: 0 at its start, 1 at its end."""
        limits = (self.steps, step), (self.minutes, minutes), (self.epochs, epochs)
        return max((value / limit for limit, value in limits if limit), default=0.0)

    def lr_factor(self, step: int, done: float) -> float:
        """The factor of all learning rates in step number `step`, with the share `done` of the stage behind it: linear
        warm-up, flat, then the decay."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if done < self.warmup_fraction:
            warmup = min(warmup, done / self.warmup_fraction)
        left = min(1.0, max(0.0, 1.0 - done) / max(1e-9, self.decay_fraction))
        if self.decay == "linear":
            return warmup * max(self.final_lr, left)
        return warmup * (self.final_lr + (1 - self.final_lr) * (1 - math.cos(math.pi * left)) / 2)

    @field_validator("trains", "freezes")
    @classmethod
    def _check_parts(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if name not in PARTS and not any(character in name for character in "*?[."):
                known = ", ".join(PARTS)
                raise ValueError(f"{name!r} is not a part; choose {known}, or a pattern such as model.layers.3.*")
        return value

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.steps is None and self.minutes is None and self.epochs is None:
            raise ValueError(f"stage {self.name!r} needs steps, minutes or epochs")
        if self.attention == "warmup" and self.trained_parts != ("indexer",):
            raise ValueError('attention = "warmup" trains the indexer alone; set trains = "indexer"')
        if "indexer" in self.trained_parts and self.attention == "dense":
            raise ValueError('dense attention gives the indexer nothing to learn; set attention = "warmup"')
        return self


class ParallelSettings(Settings):
    """How the processes of `torchrun` divide the work."""

    shard: bool | None = None
    """Shard weights, gradients and optimizer state over the processes (FSDP2); else each holds all of them. By default
    they are on GPUs, unless a stage samples from the model."""
    expert: int = Field(default=1, gt=0)
    """Processes that divide the experts of a layer."""
    context: int = Field(default=1, gt=0)
    """Processes that divide the tokens of a batch."""
    tensor: int = Field(default=1, gt=0)
    """Processes that divide the heads, widths and experts of each layer."""


class GuardSettings(Settings):
    """What happens to steps whose loss or gradient is far from usual. Those that are no number are always left out."""

    spike: float = Field(default=20.0, gt=1)
    """How many robust standard deviations above the median of the last steps make a spike."""
    on_spike: Literal["skip", "report", "stop"] = "skip"
    """skip: leave the step out; report: warn and take it; stop: end the run. All are counted in the log."""
    patience: int = Field(default=10, gt=0)
    """The run ends after so many steps in a row were left out."""


class LoraSettings(Settings):
    """Pairs of small matrices beside layers are trained while the model stays as it is; written in PEFT's layout."""

    rank: Rank = 16
    alpha: Rate = 32.0
    """What a pair adds is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a layer's inputs that its pair does not see in a step."""
    targets: str | Names = "all-linear"
    """Layers that get a pair: all-linear (those of attention and MLP in the decoder), parts (tower, projector, vision,
    attention, dense, experts, router, indexer, head), ends of names (q_proj), or patterns of complete names with *."""
    exclude: str | Names = ()
    """Layers that get none, in the same words."""
    experts: bool = False
    """Routed experts too, with a pair for each."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    rank_pattern: Mapping[LayerName, Rank] = Field(default_factory=dict)
    """Ranks of layers by the ends of their names; those of experts end in gate_up_proj and down_proj."""
    alpha_pattern: Mapping[LayerName, Rate] = Field(default_factory=dict)


class TrainConfig(Settings):
    """A run. Relative paths are relative to the file's folder."""

    recipe: str = "family"
    """Where batches and losses come from: family (any checkpoint, data from files) or nano (keye-nano, synthetic)."""
    model: Path = Field(strict=False)
    """A folder whose config.json (and, unless `fresh`, weights) the run starts from."""
    output: Path = Field(strict=False)
    stages: tuple[StageConfig, ...] = Field(validation_alias="stage", min_length=1, strict=False)
    fresh: bool = False
    """Begin with new weights."""
    renews: Names = ()
    """Parts that begin with new weights: projector, or indexer, which is added where the model has none."""
    seed: Seed = 0
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
    checkpointing: bool = False
    """Compute the activations of each layer again in the backward pass instead of keeping them."""
    quant: Literal["int8", "int4"] | None = None
    """Quantise the model while it is loaded; only an adapter can be trained then."""
    lora: LoraSettings | None = None
    """Train an adapter instead of the weights."""
    parallel: ParallelSettings = ParallelSettings()
    guard: GuardSettings = GuardSettings()
    peak_flops: Rate | None = None
    """Operations a second that each process's device can reach, which `mfu` in the log is a share of; measured by
    default."""
    save_minutes: float = Field(default=5.0, gt=0)
    save_steps: int | None = Field(default=None, gt=0)
    """Save also every so many steps."""
    keep: int | None = Field(default=None, gt=0)
    """Checkpoints that are kept; older ones are removed."""
    log_seconds: float = 30.0

    @property
    def shards(self) -> bool:
        """Whether several processes divide the weights."""
        return self.device.startswith("cuda") if self.parallel.shard is None else self.parallel.shard

    @field_validator("renews")
    @classmethod
    def _check_renews(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PARTS:
                raise ValueError(f"{name!r} is not a part; choose {', '.join(PARTS)}")
        return names

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two stages are named {twice[0]!r}; give each a name of its own")
        if self.processes > 1 and self.device != "cpu":
            raise ValueError(f"processes is {self.processes}, but several processes train on the cpu only; set it to 1")
        if self.quant is not None and self.lora is None:
            raise ValueError(f'quant is "{self.quant}", but quantised weights cannot be trained; add [lora]')
        if self.lora is not None and self.parallel.tensor > 1:
            raise ValueError(f"parallel.tensor is {self.parallel.tensor}, but it divides the weights that an adapter "
                             "belongs to; leave it out with [lora]")  # fmt: skip
        return self

    def resolve(self, folder: Path) -> Self:
        """The same run with its relative paths taken from `folder`, that of its file."""
        paths = {name: (folder / getattr(self, name)).resolve() for name in ("model", "output")}
        return self.model_copy(update=paths)
