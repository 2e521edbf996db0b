"""Every configuration of keye: model, processor, generation. Reads and validates the official files.

Knows the field names of the official `config.json`; knows nothing of tensors. All classes are frozen: a configuration
is read once and passed around. This module and `cli` are the only ones that read the environment.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keye.checks import is_number
from keye.config_checks import (
    generation_problems,
    model_problems,
    patch_problems,
    processor_problems,
    text_field_problems,
    vision_problems,
)
from keye.errors import KeyeError


@dataclass(frozen=True)
class Architecture:
    """What an architecture name promises, beyond the numbers of its config.

    `sparse`: layers may have a DSA indexer. `moe`: layers may route to experts. `preview`: the vision tower attends
    over all frames of a video, the projector normalises before it merges, and the time axis of a video counts seconds.
    `runs`: whether its language model is implemented.
    """

    generation: str
    sparse: bool = False
    moe: bool = False
    preview: bool = False
    runs: bool = True


ARCHITECTURES = {
    "KeyeVL2MoeForConditionalGeneration": Architecture("2.0", sparse=True, moe=True),
    "KeyeVL2ForConditionalGeneration": Architecture("2.0", sparse=True),
    "KeyeVL1_5ForConditionalGeneration": Architecture("1.5"),
    "KeyeForConditionalGeneration": Architecture("preview", preview=True),
    "KeyeVLMoeForConditionalGeneration": Architecture("671B", moe=True, runs=False),
}


class ConfigError(KeyeError):
    """A configuration file is missing, unreadable, incomplete or contradicts itself."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (SigLIP geometry) and the merge of its projector. Sizes in pixels, patches or channels.

    Preview differs from its successors: `whole_video_attention` lets every patch of a grid row (t, h, w) see all t
    frames instead of its own, and `norm_before_merge` puts the projector's norm on single patches. The architecture
    decides both, not the file.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    image_size: int = 384
    num_channels: int = 3
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    rope_theta: float = 10000.0
    whole_video_attention: bool = False
    norm_before_merge: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_side(self) -> int:
        """Side of the square learned position table, in patches."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SparseConfig:
    """`sa_config`: the DeepSeek Sparse Attention indexer. One key head; `topk` keys are kept for each query."""

    indexer_num_heads: int
    indexer_head_dim: int
    topk: int
    indexer_num_kv_heads: int = 1


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `num_experts == 0` means every layer has a dense MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    sparse: SparseConfig | None = None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (0-based) routes to experts."""
        if self.num_experts == 0 or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    def indexer_mrope_section(self) -> tuple[int, int, int]:
        """The main M-RoPE sections scaled to the indexer's head dimension (16,24,24 at 128 -> 8,12,12 at 64)."""
        assert self.sparse is not None
        ratio = self.sparse.indexer_head_dim / self.head_dim
        t, h, w = (int(s * ratio) for s in self.mrope_section)
        return t, h, w


@dataclass(frozen=True)
class KeyeConfig:
    """A whole model as its `config.json` describes it. `unknown` lists keys that were kept but have no meaning here.

    `tokens_per_second` is what one second of video adds to the time axis of M-RoPE (Preview); None means that a frame
    is placed like an image and time is told in words (1.5, 2.0).
    """

    architecture: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    dtype: str = "bfloat16"
    tokens_per_second: float | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    unknown: tuple[str, ...] = field(default=(), compare=False)

    @property
    def generation(self) -> str:
        """preview, 1.5 or 2.0."""
        return ARCHITECTURES[self.architecture].generation

    def without_indexer(self) -> KeyeConfig:
        """The same model run dense: every token attends to every earlier one."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, sparse=None))


Generation = Literal["preview", "1.5", "2.0"]

#: The file that says how a checkpoint wants its media prepared.
PROCESSOR_FILE = "preprocessor_config.json"

#: What the utilities of the older generations set otherwise than 2.0 (keye-vl-utils 1.0.0 and 1.5.2).
_PROCESSOR_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "preview": {
        "image_max_tokens": 16384, "video_min_tokens": 128, "video_max_tokens": 768, "video_total_tokens": 115200,
        "min_frames": 4, "max_frames": 768, "frame_factor": 2, "frame_text": "",
    },
    "1.5": {"video_min_tokens": 48, "video_max_tokens": 768, "video_total_tokens": 65536, "min_frames": 1},
    "2.0": {},
}  # fmt: skip
#: Architectures whose media follow the rules of another generation than 2.0. The 671B model uses those of 1.5.
_GENERATION_OF: Mapping[str, Generation] = {
    "KeyeForConditionalGeneration": "preview",
    "KeyeVL1_5ForConditionalGeneration": "1.5",
    "KeyeVLMoeForConditionalGeneration": "1.5",
}


@dataclass(frozen=True)
class ProcessorConfig:
    """How media become visual tokens. One token stands for `factor` x `factor` pixels; budgets are in tokens.

    `generation` chooses the rules: Preview (absolute time, an even number of frames, a second resize by the
    processor), 1.5 (slow and fast frames) or 2.0. `frame_factor` is what the number of frames is a multiple of.
    `processor_min_pixels` and `processor_max_pixels` limit the second resize; None means there is none.
    `fast_ratio` is the tokens of a fast frame over those of a slow one, `min_frame_similarity` the share of similar
    patches below which a frame is slow.
    `frame_text` is the text before the visual tokens of one video frame; empty means that a video is one run of tokens.
    The text of the official 2.0 processor is not published; the default is the form of 1.5 and is our reading of it.
    """

    generation: Generation = "2.0"
    patch_size: int = 14
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_min_tokens: int = 4
    image_max_tokens: int = 20480
    processor_min_pixels: int | None = None
    processor_max_pixels: int | None = None
    video_min_tokens: int = 64
    video_max_tokens: int = 256
    video_total_tokens: int = 184320
    fps: float = 2.0
    frame_factor: int = 1
    min_frames: int = 2
    max_frames: int | None = None
    adaptive_budget: bool = False
    fast_ratio: float = 0.3
    min_frame_similarity: float = 0.9
    frame_text: str = "<|frame|>{seconds:.1f}"

    @classmethod
    def of(cls, generation: Generation, **changes: Any) -> ProcessorConfig:
        """The official values of a generation, with `changes`."""
        return cls(**{"generation": generation, **_PROCESSOR_DEFAULTS[generation], **changes})

    @property
    def factor(self) -> int:
        """Side of one visual token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def token_pixels(self) -> int:
        """Pixels that one visual token stands for."""
        return self.factor**2

    def __post_init__(self) -> None:
        if self.generation not in _PROCESSOR_DEFAULTS:
            raise ConfigError(f"generation {self.generation!r} is unknown; use preview, 1.5 or 2.0")
        _refuse(processor_problems(self))


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`: how a model wants to be sampled. Absent values leave the engine's defaults.

    `ground_prompt` turns an event into the question that the model was trained on; `{event}` stands for it, and a
    prompt that also has `{article}` gets the event without its own article.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    default_system: str | None = None
    ground_prompt: str = (
        "When does this happen in the video: {event}? Answer with a list of time intervals in seconds, "
        "[[start, end], ...], or [] if it never happens."
    )

    def __post_init__(self) -> None:
        _refuse(generation_problems(self))

    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of the engine's sampling parameters that the model sets."""
        values = {"max_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            values |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class HubConfig:
    """Where checkpoints come from by name: the hub's address, the folder that keeps them, and whether to ask the hub at
    all. `timeout` is for answers of the hub, in seconds."""

    endpoint: str = "https://huggingface.co"
    cache: Path = Path("~/.cache/huggingface/hub")
    offline: bool = False
    timeout: float = 20.0


def hub_config() -> HubConfig:
    """The settings in the environment, under the names that other programs for the hub use: HF_ENDPOINT, HF_HUB_CACHE,
    HF_HOME, XDG_CACHE_HOME and HF_HUB_OFFLINE."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return HubConfig(
        endpoint=(os.environ.get("HF_ENDPOINT") or HubConfig.endpoint).rstrip("/"),
        cache=Path(cache).expanduser(),
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )


# --------------------------------------------------------------------------------------------------------------------
# Reading

_TEXT_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rope_theta", "max_position_embeddings",
)  # fmt: skip
_TEXT_OPTIONAL = (
    "rms_norm_eps", "hidden_act", "attention_bias", "tie_word_embeddings", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
)  # fmt: skip
#: Fields that must be whole numbers: above 0, or 0 where that means none.
_TEXT_SIZES = (*(name for name in _TEXT_REQUIRED if name != "rope_theta"), "head_dim", "decoder_sparse_step")
_TEXT_COUNTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_VISION_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
#: Keys of official files that carry no information for the forward pass.
_INERT = frozenset(
    "architectures model_type auto_map bos_token_id eos_token_id pad_token_id vision_token_id initializer_range "
    "initializer_factor max_window_layers sliding_window use_sliding_window transformers_version use_cache torch_dtype "
    "dtype attention_dropout vision_config rope_scaling sa_config mlp_only_layers head_dim router_aux_loss_coef "
    "output_router_logits fast_video_token_id".split()
)


def model_config_from_dict(raw: Mapping[str, Any]) -> KeyeConfig:
    """Validates an official `config.json` (already parsed) and returns it as a `KeyeConfig`.

    Raises `ConfigError` naming every missing field at once, an architecture that is not supported, or the first
    contradiction between fields. Keys without meaning here are kept in `raw` and named in `unknown`.
    """
    architecture = architecture_name(raw)
    kind = ARCHITECTURES[architecture]
    if not kind.runs:
        raise ConfigError(
            f"the language model of {architecture} (Keye-VL-{kind.generation}) is DeepSeek-V3, which keye does not run "
            "yet; `keye inspect` describes it and keye.models.weights.load_vision loads its vision tower and projector"
        )
    _require(raw, [*_TEXT_REQUIRED, *_TOKEN_IDS, "vision_config"], "config.json")
    _require_whole(raw, _TEXT_SIZES, "config.json")
    _require_whole(raw, (*_TOKEN_IDS, *_TEXT_COUNTS), "config.json", least=0)
    _refuse(text_field_problems(raw))
    text = _text_config(raw, kind)
    known = {*_TEXT_REQUIRED, *_TEXT_OPTIONAL, *_TOKEN_IDS, *_INERT}
    eos = raw.get("eos_token_id")
    config = KeyeConfig(
        architecture=architecture,
        text=text,
        vision=vision_config_from_dict(raw),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (int(eos),)),
        pad_token_id=raw.get("pad_token_id"),
        dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
        raw=dict(raw),
        tokens_per_second=_tokens_per_second(raw["vision_config"]) if kind.preview else None,
        unknown=tuple(sorted(set(raw) - known)),
        **{name: int(raw[name]) for name in _TOKEN_IDS},
    )
    _refuse(model_problems(config))
    return config


def load_model_config(folder: Path) -> KeyeConfig:
    """Reads `folder/config.json`. Raises `ConfigError` when it is missing or no JSON object."""
    return model_config_from_dict(read_json(Path(folder) / "config.json"))


def load_processor_config(folder: Path) -> ProcessorConfig:
    """Reads `folder/preprocessor_config.json` if present; absent fields keep the official values of the generation,
    which the architecture in `folder/config.json` tells.

    `min_pixels`/`max_pixels` of the file are the limits of an image; for Preview and 1.5, whose utilities resize with
    limits of their own first, those of the processor's second resize. A `keye` object in the file holds our own fields
    (video budgets, `frame_text`); unknown fields in it are errors.
    """
    beside = Path(folder) / "config.json"
    model = read_json(beside) if beside.exists() else {}
    config = _processor_config(Path(folder) / PROCESSOR_FILE, _generation(model))
    _refuse(patch_problems(config, model))
    return config


def _processor_config(path: Path, generation: Generation) -> ProcessorConfig:
    if not path.exists():
        return ProcessorConfig.of(generation)
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    _require_whole(raw, ("patch_size", "merge_size", "min_pixels", "max_pixels"), str(path))
    values: dict[str, Any] = {k: raw[k] for k in ("patch_size", "merge_size") if k in raw}
    for name in ("image_mean", "image_std"):
        if name in raw:
            values[name] = tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
    token = (values.get("patch_size", 14) * values.get("merge_size", 2)) ** 2
    for bound in ("min", "max"):
        if f"{bound}_pixels" not in raw:
            continue
        pixels = raw[f"{bound}_pixels"]
        if generation == "2.0":
            values[f"image_{bound}_tokens"] = max(1, pixels // token)
        else:
            values[f"processor_{bound}_pixels"] = pixels
    own = _own_fields(raw, path, {f.name for f in dataclasses.fields(ProcessorConfig)})
    return ProcessorConfig.of(generation, **{**values, **own})


def _own_fields(raw: Mapping[str, Any], path: Path, known: Collection[str]) -> Mapping[str, Any]:
    """The `keye` object of a file, whose fields must be among `known`."""
    own = raw.get("keye", {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{path} has keye {own!r}; it must be an object")
    if unknown := sorted(set(own) - set(known)):
        raise ConfigError(f"{path} has unknown keye fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return own


def _generation(model: Mapping[str, Any]) -> Generation:
    """The generation whose rules for media a checkpoint follows, by its parsed config.json; 2.0 without one."""
    names = model.get("architectures") or []
    return next((_GENERATION_OF[name] for name in names if name in _GENERATION_OF), "2.0")


def preview_video_max_pixels() -> int | None:
    """VIDEO_MAX_PIXELS, with which keye-vl-utils 1.0.0 lets the environment set the pixels of all frames of a video."""
    value = os.environ.get("VIDEO_MAX_PIXELS")
    if value is None:
        return None
    try:
        return int(float(value))
    except (ValueError, OverflowError):
        raise ConfigError(f"VIDEO_MAX_PIXELS is {value!r}; it must be a number of pixels") from None


def load_generation_config(folder: Path) -> GenerationConfig:
    """Reads `folder/generation_config.json` if present. Our own fields lie in its `keye` object; unknown ones there are
    errors, unknown official ones are left alone."""
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return GenerationConfig()
    raw = read_json(path)
    fields = {f.name for f in dataclasses.fields(GenerationConfig)}
    values = {k: v for k, v in raw.items() if k in fields and v is not None}
    eos = raw.get("eos_token_id")
    if eos is not None:
        values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
    return GenerationConfig(**{**values, **_own_fields(raw, path, ("default_system", "ground_prompt"))})


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object from a file; `ConfigError` with one sentence otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _require(raw: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    if missing := [name for name in names if raw.get(name) is None]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")


def _require_whole(raw: Mapping[str, Any], names: Iterable[str], where: str, *, least: int = 1) -> None:
    """Every one of `names` that is given must be a whole number of at least `least`."""
    for name in names:
        value = raw.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{where} has {name} {value!r}; it must be a whole number of at least {least}")


def architecture_name(raw: Mapping[str, Any]) -> str:
    """The first known name in `architectures` of a parsed config.json; `ConfigError` when there is none."""
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    shown = ", ".join(map(str, names)) or "none"
    raise ConfigError(f"architecture {shown} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _text_config(raw: Mapping[str, Any], architecture: Architecture) -> TextConfig:
    section = raw["rope_scaling"]["mrope_section"]
    sparse = None
    if architecture.sparse and raw.get("sa_config"):
        wanted = ["indexer_num_heads", "indexer_head_dim", "topk"]
        _require(raw["sa_config"], wanted, "sa_config")
        _require_whole(raw["sa_config"], [*wanted, "indexer_num_kv_heads"], "sa_config")
        sparse = SparseConfig(**{name: int(raw["sa_config"][name]) for name in wanted},
                              indexer_num_kv_heads=int(raw["sa_config"].get("indexer_num_kv_heads", 1)))  # fmt: skip
    heads = int(raw["num_attention_heads"])
    optional = {name: raw[name] for name in _TEXT_OPTIONAL if raw.get(name) is not None}
    if not architecture.moe:
        optional["num_experts"] = 0
    return TextConfig(
        **{name: raw[name] for name in _TEXT_REQUIRED},
        **optional,
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
        mrope_section=(section[0], section[1], section[2]),
        mlp_only_layers=tuple(raw.get("mlp_only_layers") or ()),
        sparse=sparse,
    )


def vision_config_from_dict(raw: Mapping[str, Any]) -> VisionConfig:
    """The vision part of an official `config.json` (already parsed), of any known architecture."""
    preview = ARCHITECTURES[architecture_name(raw)].preview
    _require(raw, ["vision_config"], "config.json")
    vision = raw["vision_config"]
    if not isinstance(vision, Mapping):
        raise ConfigError(f"config.json has vision_config {vision!r}; it must be an object")
    _require(vision, _VISION_REQUIRED, "vision_config")
    sizes = ("patch_size", "image_size", "num_channels", "spatial_merge_size")
    _require_whole(vision, (*_VISION_REQUIRED, *sizes), "vision_config")
    fields = {f.name for f in dataclasses.fields(VisionConfig)} - {"whole_video_attention", "norm_before_merge"}
    config = VisionConfig(
        **{k: v for k, v in vision.items() if k in fields and v is not None},
        whole_video_attention=preview,
        norm_before_merge=preview,
    )
    _refuse(vision_problems(config))
    return config


def _tokens_per_second(vision: Mapping[str, Any]) -> float:
    """Preview's steps of the time axis in a second of video; 2 where the file says nothing, as in the official code."""
    value = vision.get("tokens_per_second")
    if value is None:
        return 2.0
    if not (is_number(value) and value > 0):
        raise ConfigError(f"vision_config.tokens_per_second is {value!r}; it must be a number above 0")
    return float(value)


def _refuse(problems: Iterable[str]) -> None:
    """Raises `ConfigError` with the first sentence, if there is one."""
    for problem in problems:
        raise ConfigError(problem)
