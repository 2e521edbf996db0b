"""The configuration of a model: its networks, its token ids and how it wants to be sampled. Reads the official files.

Knows the field names of the official `config.json`; knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye.config.files import ConfigError, own_fields, read_json, refuse, require, require_whole
from keye.config.problems import generation_problems, model_problems, text_field_problems, vision_problems
from keye.errors import is_number
from keye.releases import Architecture, Release, releases_by_architecture


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (SigLIP geometry) and the merge of its projector. Sizes in pixels, patches or channels.

    Preview differs from its successors: `whole_video_attention` lets every patch of a grid row (t, h, w) see all t
    frames instead of its own, and `norm_before_merge` puts the projector's norm on single patches. The release decides
    both, not the file.
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
    is placed like an image and its time is in the text (1.5, 2.0).
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
    def release(self) -> Release:
        """The release that the architecture belongs to."""
        return releases_by_architecture()[self.architecture]

    def without_indexer(self) -> KeyeConfig:
        """The same model run dense: every token attends to every earlier one."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, sparse=None))


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`: how a model wants to be sampled. Absent values leave the engine's defaults.

    `ground_prompt` turns an event into the question that the model was trained on; `{event}` stands for it, and a
    prompt that also has `{article}` gets the event without its own article. `examples` are questions about the sample
    clip that the model answers rightly, for people who try it.
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
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse(generation_problems(self))

    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of the engine's sampling parameters that the model sets."""
        values = {"max_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            values |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: value for name, value in values.items() if value is not None}


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
    "output_router_logits fast_video_token_id rope_parameters".split()
)


def model_config_from_dict(raw: Mapping[str, Any]) -> KeyeConfig:
    """Validates an official `config.json` (already parsed) and returns it as a `KeyeConfig`.

    Raises `ConfigError` naming every missing field at once, an architecture that is not supported, or the first
    contradiction between fields. Keys without meaning here are kept in `raw` and named in `unknown`.
    """
    raw, official = _with_rope_scaling(raw), raw
    architecture = architecture_name(raw)
    release = releases_by_architecture()[architecture]
    if not release.runs:
        raise ConfigError(
            f"the language model of {architecture} (Keye-VL-{release.name}) is {release.decoder}, which keye does not "
            "run yet; `keye inspect` describes it and keye.models.load.load_vision loads its vision tower and projector"
        )
    if raw.get("quantization_config"):
        raise ConfigError(_quantised(raw["quantization_config"]))
    require(raw, [*_TEXT_REQUIRED, *_TOKEN_IDS, "vision_config"], "config.json")
    require_whole(raw, _TEXT_SIZES, "config.json")
    require_whole(raw, (*_TOKEN_IDS, *_TEXT_COUNTS), "config.json", least=0)
    refuse(text_field_problems(raw))
    text = _text_config(raw, release.architectures[architecture])
    known = {*_TEXT_REQUIRED, *_TEXT_OPTIONAL, *_TOKEN_IDS, *_INERT}
    eos = raw.get("eos_token_id")
    config = KeyeConfig(
        architecture=architecture,
        text=text,
        vision=vision_config_from_dict(raw),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (int(eos),)),
        pad_token_id=raw.get("pad_token_id"),
        dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
        raw=dict(official),
        tokens_per_second=_tokens_per_second(raw["vision_config"], release),
        unknown=tuple(sorted(set(raw) - known)),
        **{name: int(raw[name]) for name in _TOKEN_IDS},
    )
    refuse(model_problems(config))
    return config


def _quantised(section: object) -> str:
    """The sentence on a checkpoint whose weights are quantised."""
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    named = f" ({method})" if isinstance(method, str) else ""
    return (
        f"config.json has quantization_config{named}: quantised checkpoints are not read yet; use the bfloat16 release "
        "of the model"
    )


def _with_rope_scaling(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json with `rope_scaling` and `rope_theta` also where transformers 5 saved it, which writes both as
    `rope_parameters`. `ConfigError` where a file has both and they differ."""
    joined = raw.get("rope_parameters")
    if joined is None:
        return raw
    if not isinstance(joined, Mapping):
        raise ConfigError(f"config.json has rope_parameters {joined!r}; it must be an object")
    if joined.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError("rope_parameters.partial_rotary_factor is not 1; keye rotates whole heads")
    theta = joined.get("rope_theta")
    scaling = {name: value for name, value in joined.items() if name not in ("rope_theta", "partial_rotary_factor")}
    old = raw.get("rope_scaling")
    section = old.get("mrope_section") if isinstance(old, Mapping) else None
    for was, now in ((raw.get("rope_theta"), theta), (section, scaling.get("mrope_section"))):
        if was is not None and now is not None and was != now:
            raise ConfigError(f"config.json has {was!r} in rope_scaling or rope_theta and {now!r} in rope_parameters; "
                              "remove one of them")  # fmt: skip
    return {
        **raw,
        "rope_scaling": old or scaling,
        "rope_theta": theta if raw.get("rope_theta") is None else raw["rope_theta"],
    }


def architecture_name(raw: Mapping[str, Any]) -> str:
    """The first known name in `architectures` of a parsed config.json; `ConfigError` when there is none."""
    names, known = raw.get("architectures") or [], releases_by_architecture()
    for name in names:
        if name in known:
            return str(name)
    listed = ", ".join(map(str, names)) or "none"
    raise ConfigError(f"architecture {listed} is not supported; supported are {', '.join(known)}")


def load_model_config(folder: Path) -> KeyeConfig:
    """Reads `folder/config.json`. Raises `ConfigError` when it is missing or no JSON object."""
    return model_config_from_dict(read_json(Path(folder) / "config.json"))


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
    return GenerationConfig(**{**values, **own_fields(raw, path, ("default_system", "ground_prompt", "examples"))})


def _text_config(raw: Mapping[str, Any], architecture: Architecture) -> TextConfig:
    section = raw["rope_scaling"]["mrope_section"]
    sparse = None
    if architecture.sparse and raw.get("sa_config"):
        wanted = ["indexer_num_heads", "indexer_head_dim", "topk"]
        require(raw["sa_config"], wanted, "sa_config")
        require_whole(raw["sa_config"], [*wanted, "indexer_num_kv_heads"], "sa_config")
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
    release = releases_by_architecture()[architecture_name(raw)]
    require(raw, ["vision_config"], "config.json")
    vision = raw["vision_config"]
    if not isinstance(vision, Mapping):
        raise ConfigError(f"config.json has vision_config {vision!r}; it must be an object")
    require(vision, _VISION_REQUIRED, "vision_config")
    sizes = ("patch_size", "image_size", "num_channels", "spatial_merge_size")
    require_whole(vision, (*_VISION_REQUIRED, *sizes), "vision_config")
    fields = {f.name for f in dataclasses.fields(VisionConfig)} - {"whole_video_attention", "norm_before_merge"}
    config = VisionConfig(
        **{k: v for k, v in vision.items() if k in fields and v is not None},
        whole_video_attention=release.whole_video,
        norm_before_merge=release.norm_before_merge,
    )
    refuse(vision_problems(config))
    return config


def _tokens_per_second(vision: Mapping[str, Any], release: Release) -> float | None:
    """Steps of the time axis in a second of video; the release's where the file says nothing."""
    value = vision.get("tokens_per_second")
    if value is None or release.tokens_per_second is None:
        return release.tokens_per_second
    if not (is_number(value) and value > 0):
        raise ConfigError(f"vision_config.tokens_per_second is {value!r}; it must be a number above 0")
    return float(value)
