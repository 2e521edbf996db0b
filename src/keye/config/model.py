"""The configuration of a model: its networks, its token ids and how it wants to be sampled. Reads the official files.

Knows the field names of the official `config.json`; knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye.config.files import (
    ConfigError,
    check_fields,
    check_format,
    read_json,
    read_keye_fields,
    require,
    required_fields,
)
from keye.config.latent import LATENT_FIELDS, LATENT_REQUIRED, read_latent_text
from keye.config.quantization import check_quantization
from keye.config.text import SparseConfig, TextConfig
from keye.releases import Release, releases_by_architecture


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


@dataclass(frozen=True)
class KeyeConfig:
    """A whole model as its `config.json` describes it. `unknown` lists keys that were kept but have no meaning here.

    `tokens_per_second` is what one second of video adds to the time axis of M-RoPE (Preview); None means that a frame
    is placed like an image and its time is in the text (1.5, 2.0).

    Without `has_vision` only the language model is there (`vision_config` is null): `vision` is then nominal, and ids
    of tokens that stand for media are -1 where the vocabulary has none.
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
    has_vision: bool = True
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
class Scope:
    """What a small model knows and was measured on: `short` in a few words, `text` in a sentence, the most `frames` of
    a video, `examples` of events, what it `can` and `cannot` do, and the `words` that it reads (lower case; empty where
    it reads any). Words in capital letters stand for text in the picture."""

    short: str = ""
    text: str = ""
    frames: int | None = None
    examples: tuple[str, ...] = ()
    can: tuple[str, ...] = ()
    cannot: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds = {"text": ("short", "text"), "size": ("frames",), "texts": ("examples", "can", "cannot", "words")}
        check_fields("generation_config.json", vars(self), kinds, required=required_fields(Scope))


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`: how a model wants to be sampled. Absent values leave the engine's defaults.

    `ground_prompt` turns an event into the question that the model was trained on; `{event}` stands for it, and a
    prompt that also has `{article}` gets the event without its own article. `presence_prompt` is the same for the
    question, to be answered with yes or no, whether it happens at all; its article is "a" or "an". `word_ground_prompt`
    and `word_presence_prompt`, where they are given, ask about a `{word}` that is written in the picture.
    `title_prompt` asks for the title of a picture out of a video. `examples` are questions about the sample clip that
    the model answers rightly, for people who try it. `scope` says what the model knows, None where that is not known.
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
    presence_prompt: str = "Does this happen in the video: {event}? Answer with yes or no."
    title_prompt: str = "Give this picture from a video a title of at most six words. Answer with the title alone."
    word_ground_prompt: str | None = None
    word_presence_prompt: str | None = None
    examples: tuple[str, ...] = ()
    scope: Scope | None = None

    def __post_init__(self) -> None:
        check_fields(
            "generation_config.json", vars(self), _GENERATION_KINDS, required=required_fields(GenerationConfig)
        )
        check_format("ground_prompt", self.ground_prompt, event="", article="")
        check_format("presence_prompt", self.presence_prompt, event="", article="")
        for name in ("word_ground_prompt", "word_presence_prompt"):
            if (prompt := getattr(self, name)) is not None:
                check_format(name, prompt, word="")

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
_VISION_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_MODEL_KINDS = {
    "size": (*(name for name in _TEXT_REQUIRED if name != "rope_theta"), "head_dim", "decoder_sparse_step"),
    "count": (*_TOKEN_IDS, "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "positive": ("rope_theta", "rms_norm_eps"),
    "flag": ("attention_bias", "tie_word_embeddings", "norm_topk_prob"),
    "layers": ("mlp_only_layers",),
    "tokens": ("eos_token_id",),
    "token": ("pad_token_id",),
    "object": ("sa_config", "vision_config"),
}
_VISION_KINDS = {
    "size": (*_VISION_REQUIRED, "patch_size", "image_size", "num_channels", "spatial_merge_size"),
    "positive": ("rope_theta", "layer_norm_eps"),
}
#: What stands for the vision tower of a model without one: that of every release.
_NOMINAL_VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
}  # fmt: skip
_SPARSE_KINDS = {"size": ("indexer_num_heads", "indexer_head_dim", "topk", "indexer_num_kv_heads")}
#: Fields that stand in the object `keye` of generation_config.json; the others are official ones.
GENERATION_FIELDS = (
    "default_system", "ground_prompt", "presence_prompt", "word_ground_prompt", "word_presence_prompt", "title_prompt",
    "examples", "scope",
)  # fmt: skip
_GENERATION_KINDS = {
    "flag": ("do_sample",),
    "count": ("top_k",),
    "size": ("max_new_tokens",),
    "temperature": ("temperature",),
    "positive share": ("top_p",),
    "factor": ("repetition_penalty",),
    "tokens": ("eos_token_ids",),
    "text": (
        "default_system",
        "ground_prompt",
        "presence_prompt",
        "title_prompt",
        "word_ground_prompt",
        "word_presence_prompt",
    ),
    "texts": ("examples",),
}
#: Names of the rotary embedding that keye implements. Others stretch the context by changing the frequencies.
_ROPE_TYPES = (None, "mrope", "default")
#: Keys of official files that carry no information for the forward pass.
_INERT = frozenset(
    "architectures model_type auto_map bos_token_id eos_token_id pad_token_id vision_token_id initializer_range "
    "initializer_factor max_window_layers sliding_window use_sliding_window transformers_version use_cache torch_dtype "
    "dtype attention_dropout vision_config rope_scaling sa_config mlp_only_layers head_dim router_aux_loss_coef "
    "output_router_logits fast_video_token_id rope_parameters quantization_config quantization "
    "compression_config".split()
)


def model_config_from_dict(raw: Mapping[str, Any]) -> KeyeConfig:
    """Validates an official `config.json` (already parsed) and returns it as a `KeyeConfig`.

    Raises `ConfigError` naming every missing field at once, an architecture that is not supported, or the first
    contradiction between fields. Keys without meaning here are kept in `raw` and named in `unknown`.
    """
    raw, official = _merge_rope_fields(raw), raw
    architecture = architecture_name(raw)
    release = releases_by_architecture()[architecture]
    check_quantization(raw)
    has_vision = not ("vision_config" in raw and raw["vision_config"] is None)
    is_latent = "latent" in (features := release.architectures[architecture])
    needed = [*(LATENT_REQUIRED if is_latent else _TEXT_REQUIRED)]
    require(raw, [*needed, *((*_TOKEN_IDS, "vision_config") if has_vision else ())], "config.json")
    check_fields("config.json", raw, _MODEL_KINDS)
    if raw.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is true; no Keye model uses it and it is not supported")
    if is_latent:
        text, known = read_latent_text(raw), {*LATENT_FIELDS, *_TOKEN_IDS, *_INERT}
    else:
        text, known = _read_text(raw, features), {*_TEXT_REQUIRED, *_TEXT_OPTIONAL, *_TOKEN_IDS, *_INERT}
    eos = raw.get("eos_token_id")
    vision = vision_config_from_dict(raw if has_vision else {**raw, "vision_config": _NOMINAL_VISION})
    tokens_per_second = release.tokens_per_second
    if tokens_per_second is not None and has_vision:
        check_fields("vision_config", raw["vision_config"], {"positive": ("tokens_per_second",)})
        tokens_per_second = float(raw["vision_config"].get("tokens_per_second") or tokens_per_second)
    config = KeyeConfig(
        architecture=architecture,
        text=text,
        vision=vision,
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (int(eos),)),
        pad_token_id=raw.get("pad_token_id"),
        dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"),
        raw=dict(official),
        tokens_per_second=tokens_per_second,
        has_vision=has_vision,
        unknown=tuple(sorted(set(raw) - known)),
        **{name: int(raw.get(name, -1)) for name in _TOKEN_IDS},
    )
    for problem in (*_contradictions(text), *_token_contradictions(config)):
        raise ConfigError(problem)
    return config


def _merge_rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
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
    shared = [(old[name], scaling[name]) for name in scaling if name in old] if isinstance(old, Mapping) else []
    for was, now in ((raw.get("rope_theta"), theta), *shared):
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
    own = read_keye_fields(raw, path, GENERATION_FIELDS)
    if own.get("scope") is not None:
        own["scope"] = _read_scope(own["scope"], path)
    return GenerationConfig(**{**values, **own})


def _read_scope(raw: Any, path: Path) -> Scope:
    known = [field.name for field in dataclasses.fields(Scope)]
    if not isinstance(raw, Mapping) or set(raw) - set(known):
        raise ConfigError(f"{path} has keye scope {raw!r}; it must be an object of {', '.join(known)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Scope(**values)


def _read_text(raw: Mapping[str, Any], features: Collection[str]) -> TextConfig:
    """The decoder of every release but 671B."""
    scaling = raw.get("rope_scaling")
    if not isinstance(scaling, Mapping) or "mrope_section" not in scaling:
        raise ConfigError("config.json lacks rope_scaling.mrope_section, the three M-RoPE sections of the decoder")
    check_fields("rope_scaling", scaling, {"three sizes": ("mrope_section",)}, required=("mrope_section",))
    for problem in _rope_problems(scaling):
        raise ConfigError(problem)
    section = scaling["mrope_section"]
    sparse = None
    if "sparse" in features and raw.get("sa_config"):
        wanted = ["indexer_num_heads", "indexer_head_dim", "topk"]
        require(raw["sa_config"], wanted, "sa_config")
        check_fields("sa_config", raw["sa_config"], _SPARSE_KINDS)
        sparse = SparseConfig(**{name: int(raw["sa_config"][name]) for name in wanted},
                              indexer_num_kv_heads=int(raw["sa_config"].get("indexer_num_kv_heads", 1)))  # fmt: skip
    heads = int(raw["num_attention_heads"])
    optional = {name: raw[name] for name in _TEXT_OPTIONAL if raw.get(name) is not None}
    if "moe" not in features:
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
    check_fields("config.json", raw, {"object": ("vision_config",)})
    vision = raw["vision_config"]
    require(vision, _VISION_REQUIRED, "vision_config")
    check_fields("vision_config", vision, _VISION_KINDS)
    fields = {f.name for f in dataclasses.fields(VisionConfig)} - {"whole_video_attention", "norm_before_merge"}
    config = VisionConfig(
        **{k: v for k, v in vision.items() if k in fields and v is not None},
        whole_video_attention=release.whole_video,
        norm_before_merge=release.norm_before_merge,
    )
    heads = config.num_attention_heads
    if config.hidden_size % heads or config.head_dim % 4:
        raise ConfigError(f"vision hidden_size {config.hidden_size} must be {heads} heads of a multiple of 4")
    if config.hidden_act != "gelu_pytorch_tanh":
        raise ConfigError(f"vision hidden_act {config.hidden_act!r} is not supported")
    if config.image_size < config.patch_size:
        raise ConfigError(f"vision image_size {config.image_size} holds no patch of {config.patch_size} pixels")
    return config


def _rope_problems(scaling: Mapping[str, Any]) -> Iterator[str]:
    """What the rotary embedding of a parsed config.json asks for and keye does not implement."""
    if scaling.get("mrope_interleaved"):
        yield "rope_scaling.mrope_interleaved is true; only the contiguous M-RoPE layout is supported"
    for name in ("type", "rope_type"):
        if scaling.get(name) not in _ROPE_TYPES:
            yield f"rope_scaling.{name} is {scaling[name]!r}; only mrope and default are implemented"
    if scaling.get("factor") not in (None, 1):
        yield f"rope_scaling.factor is {scaling['factor']!r}, but scaled positions are not implemented; remove it"


def _contradictions(text: TextConfig) -> Iterator[str]:
    """Contradictions between the fields of a decoder."""
    if sum(text.mrope_section) * 2 != text.rotary_dim or min(text.mrope_section) < 0:
        yield f"mrope_section {list(text.mrope_section)} must sum to head_dim/2 = {text.rotary_dim // 2}"
    if text.num_attention_heads % text.num_key_value_heads:
        yield (f"num_attention_heads {text.num_attention_heads} is not a multiple of "
               f"num_key_value_heads {text.num_key_value_heads}")  # fmt: skip
    if text.num_experts > 0 and not 0 < text.num_experts_per_tok <= text.num_experts:
        yield f"num_experts_per_tok {text.num_experts_per_tok} must lie between 1 and num_experts {text.num_experts}"
    if text.num_experts > 0 and text.moe_intermediate_size <= 0:
        yield "num_experts needs moe_intermediate_size"
    if text.hidden_act != "silu":
        yield f"hidden_act {text.hidden_act!r} is not supported; Keye decoders use silu"
    if any(not 0 <= i < text.num_hidden_layers for i in text.mlp_only_layers):
        yield f"mlp_only_layers {list(text.mlp_only_layers)} names layers outside 0..{text.num_hidden_layers - 1}"
    if text.sparse is not None:
        dim = text.sparse.indexer_head_dim
        if dim & (dim - 1):
            yield f"sa_config.indexer_head_dim {dim} must be a power of two"
        if sum(text.indexer_mrope_section()) * 2 != dim:
            yield f"mrope_section {list(text.mrope_section)} does not scale to sa_config.indexer_head_dim {dim}"
        if text.sparse.indexer_num_kv_heads != 1:
            yield "sa_config.indexer_num_kv_heads must be 1"


def _token_contradictions(config: KeyeConfig) -> Iterator[str]:
    """Contradictions between token ids and the vocabulary."""
    names: dict[int, str] = {}
    for name in _TOKEN_IDS:
        index = getattr(config, name)
        if index < 0:
            continue  # a model without vision
        if index >= config.text.vocab_size:
            yield f"{name} {index} is beyond the vocabulary: vocab_size is {config.text.vocab_size}"
        if index in names:
            yield f"{names[index]} and {name} are both {index}; each needs a token of its own"
        names[index] = name
