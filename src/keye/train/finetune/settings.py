"""Settings of `keye finetune`, from its flags or a file with the same names, and the training run that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field, model_validator

from keye.config import ConfigError, KeyeConfig
from keye.config.settings import explain_fields, parse_settings, read_toml
from keye.models.quant_fill import stored_policy
from keye.train.config import GuardSettings, LoraSettings, Rank, Seed
from keye.train.recipes.family.config import DataConfig, FamilyConfig, FamilyStage, MediaConfig

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]

#: Learning rate where none is set, by method.
LEARNING_RATES: Final = {"lora": 1e-4, "full": 1e-5}
#: Most tokens of a sample and of a pack where none is set.
MAX_LENGTH: Final = 8192
#: Options of media that hold where a sample has none of its own.
MEDIA: Final = tuple(MediaConfig.model_fields)
#: Settings that name files and folders.
_PATHS: Final = ("model", "data", "val_data", "output", "root")


class FinetuneSettings(MediaConfig):
    """Settings of a fine-tuning, under the names of the flags of `keye finetune`."""

    model: str
    """A name (nano, 1.5, 2.0), a name on the hub, or a folder with weights."""
    data: tuple[str, ...] = Field(min_length=1, strict=False)
    """Files or folders to learn from; #2000 or #50% behind a path takes so much of it."""
    output: Path = Field(strict=False)
    """Folder of the adapter, or of the model with method = "full"."""
    weights: tuple[Rate, ...] = Field(default=(), strict=False)
    """How often the rows of each of `data` come in an epoch, in their order."""
    val_data: tuple[str, ...] = Field(default=(), strict=False)
    """Files that are not learnt from: their loss is measured."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the columns of the data: messages = "conversation"."""
    root: Path | None = Field(default=None, strict=False)
    """Folder that media paths are relative to; without, that of the file."""

    method: Literal["lora", "full"] = "lora"
    """lora trains an adapter, full the weights themselves."""
    quant: Literal["int4", "int8"] | None = None
    """Quantise the frozen base while it is loaded (QLoRA)."""
    lora_rank: Rank = 16
    lora_alpha: Rate = 32.0
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    """Count the adapter by alpha / sqrt(rank) instead of alpha / rank."""
    target_modules: tuple[str, ...] = Field(default=("all-linear",), strict=False)
    """Layers that get an adapter: all-linear, or names such as q_proj."""
    lora_experts: bool = False
    """Adapt the routed experts of a mixture too, with a pair for each."""
    freeze_vision: bool = True
    freeze_projector: bool = True
    freeze_llm: bool = False
    freeze_indexer: bool = True

    learning_rate: Rate | None = None
    """Of the language model. Without: 1e-4 for lora, 1e-5 for full."""
    vision_lr: Rate | None = None
    """Of the vision tower, where it is not frozen. Without: learning_rate."""
    projector_lr: Rate | None = None
    """Of the projector, where it is not frozen. Without: learning_rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    """Steps over which learning rates rise in the beginning."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the run over which they rise, where that is longer."""
    weight_decay: float = Field(default=0.0, ge=0)
    clip: Rate = 1.0
    """Largest norm of a gradient."""
    epochs: Rate | None = None
    max_steps: Count | None = None
    batch_size: Count = 1
    """Packs of a step (samples, with packing = false) in each process."""
    gradient_accumulation: Count = 1
    """Batches whose gradients make one step."""
    max_length: Count | None = None
    """Most tokens of a pack, and of a sample. Without: 8192, or the model's context where that is shorter."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer sample; none is ever cut."""
    packing: bool = True
    """Several samples share a pass; none sees another."""
    gradient_checkpointing: bool = True
    """Compute the layers again in the backward pass instead of keeping what they computed."""

    seed: Seed = 0
    device: str = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: Count | None = None
    """Processor threads of each process. Without: all of this machine's, divided among the processes."""
    processes: Count = 1
    save_steps: Count | None = None
    eval_steps: Count | None = None
    save_total_limit: Count | None = None
    """Checkpoints that are kept."""
    samples: int = Field(default=3, ge=0, le=50)
    """Questions of the validation data that are answered before and after."""

    @model_validator(mode="after")
    def _check(self) -> FinetuneSettings:
        if self.method == "full" and self.quant is not None:
            raise ValueError(f'quant = "{self.quant}" leaves numbers that cannot be trained; set method = "lora"')
        if self.freeze_vision and self.freeze_projector and self.freeze_llm and self.freeze_indexer:
            raise ValueError("every part is frozen, so that nothing would be learnt; set freeze_llm = false")
        if self.lora_experts and self.freeze_llm:
            raise ValueError("lora_experts adapts a part that freeze_llm freezes; leave one of the two out")
        for name, is_frozen in (("vision_lr", self.freeze_vision), ("projector_lr", self.freeze_projector)):
            if getattr(self, name) is not None and is_frozen:
                raise ValueError(f"{name} has no effect on a frozen part; set freeze_{name[:-3]} = false")
        if self.weights and len(self.weights) != len(self.data):
            numbers = f"{len(self.weights)} numbers for {len(self.data)} data sets"
            raise ValueError(f"weights has {numbers}; give each set its own")
        if self.eval_steps is not None and not self.val_data:
            raise ValueError("eval_steps needs val_data to measure; give it, or leave eval_steps out")
        if self.nframes is not None and self.fps is not None:
            raise ValueError("nframes and fps exclude each other; set one of them")
        return self

    @property
    def rate(self) -> float:
        """The learning rate of the language model."""
        return self.learning_rate or LEARNING_RATES[self.method]


def load_settings(file: Path | None, names: Mapping[str, Any]) -> FinetuneSettings:
    """The settings of a file with `names` over them. Paths in the file are relative to its folder."""
    raw = {} if file is None else read_toml(file, "a file with the names of the flags of keye finetune")
    if file is not None and ("stage" in raw or "recipe" in raw):
        raise ConfigError(f"{file} is a file of keye train: run keye train {file}, or give the names of flags")
    for name in _PATHS if file is not None else ():
        if name in raw:
            raw[name] = _resolve(file, name, raw[name])  # type: ignore[arg-type]
    raw |= names
    if missing := [name for name in ("model", "data", "output") if not raw.get(name)]:
        place = "" if file is None else f"{file}: "
        wanted = {"model": "name a model", "data": "name the data", "output": "name the folder to write with -o"}
        example = "keye finetune 1.5 train.jsonl -o captions"
        raise ConfigError(f"{place}{wanted[missing[0]]}, as in: {example}")
    return parse_settings(FinetuneSettings, raw, file or Path("keye finetune"))


def _resolve(file: Path, name: str, value: Any) -> Any:
    """A path of a file as one from the file's folder; the name of a model that is not a folder there stays."""
    if isinstance(value, list):
        return [_resolve(file, name, entry) for entry in value]
    if not isinstance(value, str):
        return value
    path = file.parent / value
    return value if name == "model" and not path.exists() else str(path)


def make_run(settings: FinetuneSettings, folder: Path, config: KeyeConfig) -> FamilyConfig:
    """The training run: one stage of the family's recipe on the model in `folder`, whose configuration is `config`.

    `ConfigError` for settings that do not fit the model.
    """
    with explain_fields("keye finetune"):
        return _make_run(settings, folder, config)


def _make_run(settings: FinetuneSettings, folder: Path, config: KeyeConfig) -> FamilyConfig:
    is_sparse, context = config.text.sparse is not None, config.text.max_position_embeddings
    if settings.max_length is not None and settings.max_length > context:
        raise ConfigError(f"max_length is {settings.max_length:,}, and the model's context holds {context:,}; lower it")
    if not settings.freeze_indexer and not is_sparse:
        raise ConfigError(f"{folder} has no indexer, which freeze_indexer = false would teach; leave it out")
    if settings.method == "full" and stored_policy(config) is not None:
        raise ConfigError(f"{folder} is quantised and cannot be trained as a whole; leave --method full out, or start "
                          "from the model that it was made of")  # fmt: skip
    settings = settings.model_copy(update={"max_length": settings.max_length or min(MAX_LENGTH, context)})
    lora = None
    if settings.method == "lora":
        parts = _freezing(settings, is_sparse)
        targets = () if settings.freeze_llm else settings.target_modules
        targets += tuple(name for name, is_frozen in parts.items() if not is_frozen)
        lora = LoraSettings(
            rank=settings.lora_rank, alpha=settings.lora_alpha, dropout=settings.lora_dropout, targets=targets,
            exclude=tuple(name for name, is_frozen in parts.items() if is_frozen), rslora=settings.rslora,
            experts=settings.lora_experts,
        )  # fmt: skip
    threads = settings.threads or max(1, torch.get_num_threads() // settings.processes)
    return FamilyConfig(
        model=folder.resolve(), output=settings.output.resolve(), stages=(_make_stage(settings, is_sparse),),
        seed=settings.seed, device=settings.device, dtype=settings.dtype, threads=threads,
        processes=settings.processes, checkpointing=settings.gradient_checkpointing, quant=settings.quant, lora=lora,
        save_steps=settings.save_steps, keep=settings.save_total_limit,
        log_seconds=3.0,  # a record is the mean since the one before, and runs are often short
        guard=GuardSettings(on_spike="report"),  # a rare kind of sample may differ most, and is there to be learnt
    )  # fmt: skip


def _freezing(settings: FinetuneSettings, is_sparse: bool) -> dict[str, bool]:
    """Parts beside the language model, and whether each is frozen."""
    parts = {"tower": settings.freeze_vision, "projector": settings.freeze_projector}
    return parts | ({"indexer": settings.freeze_indexer} if is_sparse else {})


def _make_stage(settings: FinetuneSettings, is_sparse: bool) -> FamilyStage:
    decoder = () if settings.freeze_llm else ("decoder",)
    trained = (*decoder, *(name for name, is_frozen in _freezing(settings, is_sparse).items() if not is_frozen))
    freezes = ("indexer",) if is_sparse and settings.freeze_indexer and decoder else ()
    return FamilyStage(
        name="finetune", steps=settings.max_steps, epochs=settings.epochs or (None if settings.max_steps else 1.0),
        trains=trained, freezes=freezes, attention="sparse" if is_sparse else "dense",
        indexer_kl=0.0 if settings.freeze_indexer else 1.0,
        data=_data_sets(settings, settings.data, settings.weights), val_data=_data_sets(settings, settings.val_data),
        media=MediaConfig(**{name: getattr(settings, name) for name in MEDIA}),
        max_tokens=settings.max_length or MAX_LENGTH, too_long=settings.too_long, packing=settings.packing,
        batch=settings.batch_size * settings.gradient_accumulation * settings.processes,
        optimizer=settings.optimizer, lr=settings.rate, adam_lr=settings.rate, vision_lr=settings.vision_lr,
        projector_lr=settings.projector_lr, warmup_steps=settings.warmup_steps,
        warmup_fraction=settings.warmup_ratio,
        decay="linear" if settings.lr_schedule == "linear" else "cosine",
        decay_fraction=0.0 if settings.lr_schedule == "constant" else 1.0, final_lr=0.0,
        weight_decay=settings.weight_decay, clip=settings.clip, eval_steps=settings.eval_steps,
    )  # fmt: skip


def _data_sets(
    settings: FinetuneSettings, paths: tuple[str, ...], weights: tuple[float, ...] = ()
) -> tuple[DataConfig, ...]:
    root = None if settings.root is None else str(settings.root.resolve())
    return tuple(
        DataConfig(path=str(Path(path).expanduser().absolute()), weight=weight, columns=settings.columns, root=root)
        for path, weight in zip(paths, weights or (1.0,) * len(paths), strict=True)
    )
