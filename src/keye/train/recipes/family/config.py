"""The tables of the family's recipe: data, objective, lengths, and what single objectives need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from keye.config.settings import Settings
from keye.train.config import Rate, Share, StageConfig, TrainConfig, Weight

#: What a stage minimises; pairs and modes sample replies and write data for later stages, and change no weights.
ObjectiveName = Literal["next_token", "siglip", "distill", "dpo", "mpo", "pairs", "modes"]
#: Text forms that a sample's reply is brought to (`keye.train.modes`).
ModeName = Literal["think", "no_think", "auto", "image", "video"]
Count = Annotated[int, Field(gt=0)]


class DataConfig(Settings):
    """One data set."""

    path: str
    """A file or folder in any of the formats of docs/data-formats.md; `#2000` or `#50%` at its end draws a part.
    `{output}` is the run's output folder, where earlier stages have written theirs."""
    weight: float = Field(default=1.0, gt=0)
    """How often each of its rows comes in a pass over all data."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the file's fields by the names that keye expects."""
    root: str | None = None
    """The folder that relative paths of media start from; the file's own by default."""
    mode: ModeName | None = None
    """The mode of samples that name none."""

    def resolve(self, folder: Path) -> DataConfig:
        """The same with its relative paths taken from `folder`."""
        path = self.path if self.path.startswith("{output}") else str(folder.resolve() / self.path)
        root = None if self.root is None else str(folder.resolve() / self.root)
        return self.model_copy(update={"path": path, "root": root})


class MediaConfig(Settings):
    """Options of media whose samples set none."""

    fps: Rate | None = None
    nframes: Count | None = None
    min_frames: Count | None = None
    max_frames: Count | None = None
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    video_total_pixels: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least} is {low:,} and {most} is {high:,}; {most} cannot be smaller")
        return self


class SamplingConfig(Settings):
    """How replies are sampled from the model in training."""

    replies: int = Field(default=4, gt=0)
    """Replies to each prompt."""
    temperature: Weight = 1.0
    top_p: Share = 1.0
    max_tokens: int = Field(default=512, gt=0)
    prompts: Count | None = None
    """Prompts that are sampled in all; every sample of the data by default."""


class JudgeConfig(Settings):
    """A model behind an OpenAI-compatible endpoint that grades replies beside the rules."""

    url: str
    model: str
    weight: Weight = 1.0
    """Of its grade, 0 to 1, beside the rules'."""
    key_file: Path | None = Field(default=None, strict=False)
    """A file that holds the key of the endpoint."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that an answer may take."""


class SiglipConfig(Settings):
    """The text tower that vision pre-training compares pictures with; it is not kept."""

    width: int = Field(default=768, gt=0)
    layers: int = Field(default=12, gt=0)
    heads: int = Field(default=12, gt=0)
    tokens: int = Field(default=64, gt=0)
    """Tokens of a caption that count; longer ones are cut."""
    temperature: float = Field(default=10.0, gt=0)
    """Scale of the similarities in the beginning."""
    bias: float = -10.0

    @model_validator(mode="after")
    def _check(self) -> SiglipConfig:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, which {self.heads} heads do not divide; choose a multiple")
        return self


class DistillConfig(Settings):
    """On-policy distillation: the student's own replies under the probabilities of a stronger teacher."""

    teacher: Path = Field(strict=False)
    """The teacher's folder; its tokenizer must be the student's."""
    form: Literal["sampled", "topk"] = "topk"
    """sampled: reverse KL by the tokens that were sampled. topk: summed over tokens that both rank high."""
    topk: int = Field(default=20, gt=0)
    least_mass: Share = 0.9
    """topk: where the student's probability of the shared tokens is less, the sampled token is used."""


class PreferenceConfig(Settings):
    """Losses over pairs of replies. Weights are those of InternVL's mixed preference optimisation."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to its weights at the stage's beginning."""
    preference: Weight = 0.8
    """Weight of DPO's loss (mpo)."""
    quality: Weight = 0.2
    """Weight of BCO's loss (mpo)."""
    next_token: Weight = 1.0
    """Weight of the better reply's next-token loss (mpo)."""


class FamilyStage(StageConfig):
    """A stage over data from files."""

    objective: ObjectiveName = "next_token"
    data: tuple[DataConfig, ...] = Field(min_length=1, strict=False)
    val_data: tuple[DataConfig, ...] = Field(default=(), strict=False)
    """Held-out data whose loss is measured."""
    media: MediaConfig = MediaConfig()
    max_tokens: int = Field(default=8192, gt=0)
    """Most tokens of a pack, and so of a sample."""
    batch: int = Field(default=1, gt=0)
    """Packs of a step over all processes; samples where `packing` is false."""
    packing: bool = True
    """Put several samples into one pack; they do not see one another."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a sample of more than `max_tokens`: an error, or it is dropped and counted. None is cut."""
    features_gib: Weight = 64.0
    """GiB of visual tokens that are kept on disk while nothing that computes them is trained; 0 for none."""
    context: Count | None = None
    """Change the longest context of the model, in tokens (`max_position_embeddings`)."""
    rope_theta: Rate | None = None
    """Change the base of the rotary positions."""
    topk: Count | None = None
    """Change the number of keys that sparse attention selects."""
    optimizer: Literal["muon", "adamw"] = "adamw"
    lr: Rate = 1e-5
    adam_lr: Rate = 1e-5
    decay: Literal["linear", "cosine"] = "cosine"
    decay_fraction: Share = 1.0
    final_lr: Share = 0.1
    weight_decay: Weight = 0.1
    indexer_kl: Weight = 0.25
    siglip: SiglipConfig = SiglipConfig()
    distill: DistillConfig | None = None
    preference: PreferenceConfig = PreferenceConfig()
    sampling: SamplingConfig | None = None
    """distill, pairs, modes: how replies are sampled. dpo, mpo: sample the pairs from the prompts of the data first."""
    judge: JudgeConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_trains(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("objective") == "siglip":
            return {"trains": "tower", **raw}
        return raw

    @model_validator(mode="after")
    def _check_objective(self) -> FamilyStage:
        if self.objective == "distill" and self.distill is None:
            raise ValueError('objective = "distill" needs a teacher; add [stage.distill] with teacher = "FOLDER"')
        if self.objective == "siglip" and (set(self.trained_parts) - {"tower"} or self.attention != "dense"):
            raise ValueError('objective = "siglip" trains the vision tower alone; set trains = "tower"')
        if self.attention == "warmup" and self.objective != "next_token":
            raise ValueError(
                f'attention = "warmup" learns from the data\'s texts; leave objective "{self.objective}" out'
            )
        return self

    def resolve(self, folder: Path) -> FamilyStage:
        """The same with its relative paths taken from `folder`."""
        sets = {name: tuple(config.resolve(folder) for config in getattr(self, name)) for name in ("data", "val_data")}
        update: dict[str, Any] = dict(sets)
        if self.distill is not None:
            update["distill"] = self.distill.model_copy(update={"teacher": (folder / self.distill.teacher).resolve()})
        if self.judge is not None and self.judge.key_file is not None:
            update["judge"] = self.judge.model_copy(update={"key_file": (folder / self.judge.key_file).resolve()})
        return self.model_copy(update=update)

    @property
    def rollout(self) -> SamplingConfig:
        """How replies are sampled, by default too."""
        return self.sampling or SamplingConfig()


class FamilyConfig(TrainConfig):
    """A run with `recipe = "family"`, the default."""

    recipe: Literal["family"] = "family"
    fused: bool = False
    """Compile element-wise operations; replies and log-probabilities in training then differ from the engine's by
    rounding."""
    stages: tuple[FamilyStage, ...] = Field(validation_alias="stage", min_length=1, strict=False)

    @property
    def _samples(self) -> list[FamilyStage]:
        """The stages that sample from the model, or compare replies, by the engine."""
        return [stage for stage in self.stages if stage.objective not in ("next_token", "siglip")]

    @property
    def shards(self) -> bool:
        return super().shards and not self._samples

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        others = [stage for stage in self.stages if stage.objective != "next_token"]
        if self._samples and (self.parallel.shard or self.parallel.expert > 1):
            field, stage = "shard = true" if self.parallel.shard else "expert above 1", self._samples[0]
            raise ValueError(f'parallel has {field}, but objective = "{stage.objective}" (stage {stage.name!r}) needs '
                             "the whole model in each process; leave it out")  # fmt: skip
        for name in ("context", "tensor"):
            if getattr(self.parallel, name) > 1 and others:
                raise ValueError(f'parallel.{name} divides next tokens alone; leave it out with objective = '
                                 f'"{others[0].objective}" (stage {others[0].name!r})')  # fmt: skip
        return self

    def resolve(self, folder: Path) -> Self:
        run = super().resolve(folder)
        return run.model_copy(update={"stages": tuple(stage.resolve(folder) for stage in self.stages)})
