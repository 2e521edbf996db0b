"""The metadata of GGUF files and the official `config.json`, both ways. Tokens are in `tokens`.

Keys are llama.cpp's (`ARCHITECTURE.block_count`); what it has no key for is not stored. Files that keye wrote carry the
other small files of the checkpoint as texts under `keye.file.NAME`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from keye.releases import PREVIEW, V1_5, V2, V671B, Release
from keye.weights.gguf.names import Sizes, indexer_sizes, read_vision_recipes
from keye.weights.gguf.reader import GGUF, GGUFError, Value

#: Architectures of language models, and the releases that they can be. Names that begin with `keye` are taken as the
#: first one.
KEYE2: Final = "keye-vl2"
ARCHITECTURES: Final = {KEYE2: (V2,), "qwen3moe": (V2,), "qwen3": (V1_5, PREVIEW), "deepseek2": (V671B,)}
#: Keys that the indexer of 2.0 keeps, for files that do not say.
DEFAULT_TOPK: Final = 2048
#: Most experts of a layer.
MAX_EXPERTS: Final = 4096
#: Types of projectors: keye's own names, one for each layout. Others are recognised by their shapes.
PROJECTORS: Final = {"keye": PREVIEW, "keye1_5": V1_5, "keye2": V2}
_PROJECTOR_PREFIXES: Final = ("keye", "paddleocr")
#: Small files that travel in the metadata, besides config.json and the tokenizer.
FILES: Final = (
    "preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json", "search.json",
)  # fmt: skip
#: What chat templates call special tokens, and GGUF does.
_NAMED_TOKENS: Final = {
    "bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"
}  # fmt: skip
FILE_KEY: Final = "keye.file."
_MAX_FILE: Final = 1 << 20

_TEXT_KEYS: Final = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}  # fmt: skip
#: What no file may lack, and llama.cpp's base of angles for files that do not say.
_REQUIRED: Final = ("block_count", "context_length", "embedding_length", "attention.head_count")
_ROPE_BASE: Final = 10000.0
_EXPERT_KEYS: Final = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_SPARSE_KEYS: Final = {
    "attention.indexer.head_count": "indexer_num_heads", "attention.indexer.key_length": "indexer_head_dim",
    "attention.indexer.top_k": "topk",
}  # fmt: skip
#: DeepSeek-V3's own, in the words of its config.json.
_LATENT_KEYS: Final = {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor", "leading_dense_block_count": "first_k_dense_replace",
    "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim", "attention.value_length_mla": "v_head_dim",
}  # fmt: skip
_YARN_KEYS: Final = {
    "rope.scaling.factor": "factor", "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow",
}  # fmt: skip
_VISION_KEYS: Final = {
    "clip.vision.image_size": "image_size", "clip.vision.patch_size": "patch_size",
    "clip.vision.embedding_length": "hidden_size", "clip.vision.feed_forward_length": "intermediate_size",
    "clip.vision.block_count": "num_hidden_layers", "clip.vision.attention.head_count": "num_attention_heads",
    "clip.vision.spatial_merge_size": "spatial_merge_size",
}  # fmt: skip
_PIXEL_KEYS: Final = {
    "clip.vision.image_min_pixels": "min_pixels", "clip.vision.image_max_pixels": "max_pixels",
    "clip.vision.image_mean": "image_mean", "clip.vision.image_std": "image_std",
}  # fmt: skip
#: Tokens that stand for media, and the fields of config.json for their ids.
MEDIA_TOKENS: Final = {
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Writing


def text_metadata(raw: Mapping[str, Any], architecture: str) -> dict[str, Value]:
    """The numbers of an official config.json under the keys of `architecture`, without `general.` and tokens."""
    latent = architecture == "deepseek2"
    values = {
        key: raw.get(field) for key, field in {**_TEXT_KEYS, **(_LATENT_KEYS if latent else _EXPERT_KEYS)}.items()
    }
    heads = raw["num_attention_heads"]
    if latent:
        size = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
        values |= {
            "attention.head_count_kv": 1, "attention.key_length": raw["kv_lora_rank"] + raw["qk_rope_head_dim"],
            "attention.value_length": raw["kv_lora_rank"], "attention.key_length_mla": size, "expert_gating_func": 2,
            "expert_weights_norm": bool(raw.get("norm_topk_prob", True)),
        }  # fmt: skip
        scaling = raw.get("rope_scaling") or {}
        values |= {**_yarn_metadata(scaling), "rope.dimension_sections": _sections(scaling)}
    else:
        size = raw.get("head_dim") or raw["hidden_size"] // heads
        values |= {"attention.key_length": size, "attention.value_length": size}
        values["rope.dimension_sections"] = _sections(raw.get("rope_scaling") or {})
        if architecture == KEYE2:
            values |= {key: (raw.get("sa_config") or {}).get(field) for key, field in _SPARSE_KEYS.items()}
        if not raw.get("num_experts"):
            values |= dict.fromkeys(_EXPERT_KEYS)
    floats = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_weights_scale", *_YARN_KEYS)
    return {
        f"{architecture}.{key}": float(value) if key in floats and not key.endswith("context_length") else value
        for key, value in values.items()
        if value is not None
    }


def _sections(scaling: Mapping[str, Any]) -> Value | None:
    section = scaling.get("mrope_section")
    return None if section is None else np.array([*section, 0], "<i4")


def _yarn_metadata(scaling: Mapping[str, Any]) -> dict[str, Any]:
    if scaling.get("type", scaling.get("rope_type")) != "yarn":
        return {}
    if scaling.get("mscale", 0) != scaling.get("mscale_all_dim", 0):
        raise GGUFError("rope_scaling has another mscale than mscale_all_dim, which GGUF has no place for")
    values = {key: scaling.get(field) for key, field in _YARN_KEYS.items()}
    multiplier = 0.1 * float(scaling.get("mscale_all_dim") or 0)
    return {**values, "rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": multiplier}


def vision_metadata(raw: Mapping[str, Any], preprocessor: Mapping[str, Any], release: Release) -> dict[str, Value]:
    """The metadata of an mmproj file of an official config.json and preprocessor_config.json."""
    vision, projector = (
        raw["vision_config"],
        next((name for name, of in PROJECTORS.items() if of == release), "keye1_5"),
    )
    values: dict[str, Value] = {
        "clip.has_vision_encoder": True, "clip.projector_type": projector, "clip.use_gelu": True,
        "clip.vision.projection_dim": raw["hidden_size"],
        "clip.vision.attention.layer_norm_epsilon": float(vision.get("layer_norm_eps", 1e-6)),
    }  # fmt: skip
    defaults = {
        "image_size": 384,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for key, field in {**_VISION_KEYS, **_PIXEL_KEYS}.items():
        value = (vision if key in _VISION_KEYS else preprocessor).get(field, defaults.get(field))
        if value is not None:
            values[key] = np.array(value, "<f4") if isinstance(value, list) else value
    return values


# --------------------------------------------------------------------------------------------------------------------
# Reading


def check_model(file: GGUF) -> str:
    """The architecture of a language model that keye reads; `GGUFError` for other files and models."""
    kind, architecture = file.text("general.type") or "model", file.text("general.architecture") or ""
    if kind == "mmproj" or architecture == "clip":
        raise GGUFError(
            f"{file.path} is the vision part of a model (mmproj); give the model's file, and this as mmproj"
        )
    if kind != "model":
        raise GGUFError(f"{file.path} is a GGUF file of type {kind[:40]}; give one of a model")
    if architecture not in ARCHITECTURES and not architecture.startswith("keye"):
        raise GGUFError(f"{file.path} is a model of the architecture {architecture[:40]!r}; keye reads "
                        f"{', '.join(ARCHITECTURES)}")  # fmt: skip
    return architecture


def read_sizes(file: GGUF) -> Sizes:
    """What splits the tensors of a language model."""
    values = _Values(file, check_model(file))
    if check_model(file) != "deepseek2":
        return Sizes(*_indexer(values)) if _has_indexer(values) else Sizes()
    head, value = _latent_head(values)
    return Sizes(0, 0, values.count("attention.head_count"), head - values.count("rope.dimension_count"), value)


def read_config(file: GGUF, vision: GGUF | None, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The official config.json of a model and its vision part, whose tokens have the ids `tokens`. Without a vision
    part `vision_config` is null: the model answers text. `GGUFError` with one sentence where the two do not fit
    together."""
    architecture = check_model(file)
    values, release = _Values(file, architecture), _release(file, vision, architecture)
    raw: dict[str, Any] = {"architectures": [_architecture(release, values)], "torch_dtype": "bfloat16"}
    raw |= {field: values.number(key) for key, field in _TEXT_KEYS.items() if key in values and key != "vocab_size"}
    raw |= {_TEXT_KEYS[key]: values.count(key) for key in _REQUIRED}
    raw = {"rope_theta": _ROPE_BASE, "num_key_value_heads": raw["num_attention_heads"], **raw}
    raw["vocab_size"] = _rows(file, "token_embd.weight")
    _check_layers(file, "blk.", values.count("block_count"))
    _check_experts(file, values.count("expert_count", 0))
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    if release is V671B:
        raw |= _latent_config(values)
    else:
        raw |= _qwen_config(values, raw)
    for field, key in (("eos_token_id", "eos"), ("pad_token_id", "padding"), ("bos_token_id", "bos")):
        if (index := file.token(key)) is not None:
            raw[field] = index
    raw |= {field: tokens[token] for field, token in MEDIA_TOKENS.items() if token in tokens}
    raw["vision_config"] = None if vision is None else _vision_config(vision, file, raw, release)
    if vision is not None and (lacking := [token for token in MEDIA_TOKENS.values() if token not in tokens]):
        raise GGUFError(f"{file.path} has no token {lacking[0]}, which stands for media; use it without mmproj")
    return raw


def read_files(file: GGUF, vision: GGUF | None) -> dict[str, dict[str, Any]]:
    """The small JSON files beside config.json: as the checkpoint had them where keye wrote the file, else what the
    metadata tell of preprocessing and sampling."""
    files: dict[str, dict[str, Any]] = {}
    if vision is not None:
        fields = {field: _plain(vision, key) for key, field in _PIXEL_KEYS.items() if key in vision.metadata}
        files[FILES[0]] = {**fields, "patch_size": _plain(vision, "clip.vision.patch_size"),
                           "merge_size": _plain(vision, "clip.vision.spatial_merge_size", 2)}  # fmt: skip
    sampling = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}
    chosen = {field: _plain(file, f"general.sampling.{key}") for field, key in sampling.items()
              if f"general.sampling.{key}" in file.metadata}  # fmt: skip
    ends = [file.token(key) for key in ("eos", "eot", "eom")]
    if stops := list(dict.fromkeys(end for end in ends if end is not None)):
        chosen["eos_token_id"] = stops
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    named = {name: file.token(key) for name, key in _NAMED_TOKENS.items()}
    if isinstance(tokens, list) and any(index is not None for index in named.values()):
        files["tokenizer_config.json"] = {
            name: tokens[index] for name, index in named.items() if index is not None and index < len(tokens)
        }  # fmt: skip
    if chosen:
        files["generation_config.json"] = {"do_sample": bool(chosen.get("temperature")), **chosen}
    for source in (vision, file):
        for name in FILES if source is not None else ():
            if (text := source.text(FILE_KEY + name)) is not None:  # type: ignore[union-attr]
                files[name] = _parse(text, name, source)  # type: ignore[arg-type]
    return files


def _parse(text: str, name: str, file: GGUF) -> dict[str, Any]:
    try:
        value = json.loads(text) if len(text) <= _MAX_FILE else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise GGUFError(f"{file.path} has {FILE_KEY}{name} that is not a JSON object; convert the model again")
    return value


class _Values:
    """Numbers in the metadata of an architecture, checked."""

    def __init__(self, file: GGUF, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def number(self, key: str) -> int | float:
        """A number; an array, as llama.cpp writes one for each layer, where all are equal."""
        name = f"{self.architecture}.{key}"
        value = _plain(self.file, name)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise GGUFError(f"{self.file.path} has {name} {str(value)[:60]}; keye needs one number there")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        if default is not None and key not in self:
            return default
        value = self.number(key)
        if not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise GGUFError(f"{self.file.path} has {self.architecture}.{key} {value}; it must be a whole number")
        return value


def _plain(file: GGUF, key: str, default: Any = None) -> Any:
    """A value as JSON has it; float32 numbers as people write them (1e-06). `GGUFError` where it is missing."""
    value = file.metadata.get(key, default)
    if value is None:
        raise GGUFError(f"{file.path} lacks {key}; convert the model again")
    if isinstance(value, np.ndarray):
        if value.size > 4096:
            raise GGUFError(f"{file.path} has {value.size} numbers in {key}; fetch it again")
        return [_plain_number(number) for number in value.tolist()]
    return _plain_number(value)


def _plain_number(value: Any) -> Any:
    if isinstance(value, float) and abs(value) < 3e38:
        shortest = float(str(np.float32(value)))
        return int(shortest) if shortest.is_integer() and abs(shortest) < 1 << 53 else shortest
    return value


def _rows(file: GGUF, name: str) -> int:
    if name not in file.tensors or len(file.tensors[name].shape) != 2:
        raise GGUFError(f"{file.path} has no matrix {name}; it is not a whole language model: fetch it again")
    return file.tensors[name].shape[0]


def _check_layers(file: GGUF, prefix: str, count: int) -> None:
    """`GGUFError` where a file holds other layers than it promises: work grows with that number."""
    parts = (name.removeprefix(prefix).partition(".")[0] for name in file.tensors if name.startswith(prefix))
    layers = {int(part) for part in parts if part.isdecimal() and len(part) < 10}
    if layers != set(range(len(layers))) or count != len(layers):
        raise GGUFError(f"{file.path} promises {count} layers and holds tensors of {len(layers)}; fetch it again")


def _check_experts(file: GGUF, count: int) -> None:
    stacked = {tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith("_exps.weight")}
    if count > MAX_EXPERTS or stacked - {count}:
        listed = ", ".join(map(str, sorted(stacked)[:3])) or "none"
        raise GGUFError(f"{file.path} promises {count} experts and holds {listed} in a layer; at most {MAX_EXPERTS} "
                        "are read")  # fmt: skip


def _release(file: GGUF, vision: GGUF | None, architecture: str) -> Release:
    """Which release a language model and its vision part are: of those that the architecture can be, the one with the
    projector's layout."""
    fitting: tuple[Release, ...] = ARCHITECTURES.get(architecture, (V2,))
    if vision is None:
        return fitting[0]
    _check_projector(vision)
    before = _norms_before_merge(vision)
    for release in fitting:
        if release.norm_before_merge == before:
            return release
    raise GGUFError(f"{vision.path} is the vision part of Keye-VL Preview, {file.path} is another model; give its own")


def _architecture(release: Release, values: _Values) -> str:
    """The name in config.json: of two, the one without experts where the file has none."""
    routed = bool(values.count("expert_count", 0))
    names = release.architectures
    return next((name for name, features in names.items() if ("moe" in features) == routed), next(iter(names)))


def _qwen_config(values: _Values, raw: Mapping[str, Any]) -> dict[str, Any]:
    default = values.count("embedding_length") // max(1, values.count("attention.head_count"))
    size = values.count("attention.key_length", default)
    if values.count("attention.value_length", size) != size:
        raise GGUFError(f"{values.file.path} has values of another size than keys; no model of Keye has")
    _check_qwen(values, size)
    key = f"{values.architecture}.rope.dimension_sections"
    # Qwen's models without pictures have none: with equal positions on all axes any sections give the same angles.
    side = size // 2 * 3 // 8
    section = _plain(values.file, key, [size // 2 - 2 * side, side, side, 0])
    config: dict[str, Any] = {"head_dim": size, "rope_scaling": {"type": "mrope", "mrope_section": section[:3]}}
    if values.count("expert_count", 0):
        config |= {field: values.count(key) for key, field in _EXPERT_KEYS.items()}
        config.setdefault("intermediate_size", config["moe_intermediate_size"])
        config["norm_topk_prob"] = values.file.flag(f"{values.architecture}.expert_weights_norm", True)
    if _has_indexer(values):
        heads, dim = _indexer(values)
        topk = values.count("attention.indexer.top_k", DEFAULT_TOPK)
        config["sa_config"] = {"indexer_num_heads": heads, "indexer_head_dim": dim, "topk": topk}
    return {**config, **({"intermediate_size": raw["intermediate_size"]} if "intermediate_size" in raw else {})}


def _check_qwen(values: _Values, size: int) -> None:
    """`GGUFError` for arithmetic that the models of Qwen's layout do not have here: its numbers would be wrong."""
    scaling = values.file.text(f"{values.architecture}.rope.scaling.type")
    neutral: dict[str, tuple[float, ...]] = {
        "rope.scaling.factor": (0, 1), "rope.scale_linear": (0, 1), "rope.dimension_count": (size,),
        "expert_weights_scale": (0, 1),
    }  # fmt: skip
    others = [key for key, allowed in neutral.items() if key in values and values.number(key) not in allowed]
    if scaling not in (None, "none") or others:
        key, value = (others[0], values.number(others[0])) if others else ("rope.scaling.type", scaling)
        where = f"{values.file.path} has {values.architecture}.{key}"
        raise GGUFError(f"{where} {str(value)[:40]}, which keye does not run; give the file of another model")


def _has_indexer(values: _Values) -> bool:
    return "attention.indexer.head_count" in values or any("indexer" in name for name in values.file.tensors)


def _indexer(values: _Values) -> tuple[int, int]:
    """Heads of the indexer and the size of one, by the shapes of its tensors where the metadata lack them."""
    if "attention.indexer.head_count" in values:
        return values.count("attention.indexer.head_count"), values.count("attention.indexer.key_length")
    shapes = {tensor.name: tensor.shape for tensor in values.file.tensors.values()}
    return indexer_sizes(shapes, str(values.file.path))


def _latent_head(values: _Values) -> tuple[int, int]:
    """Sizes of DeepSeek's queries and values, in files with the attention folded (`_mla`) and older ones."""
    mla = "attention.key_length_mla" in values
    return tuple(values.count(f"attention.{part}_length{'_mla' if mla else ''}") for part in ("key", "value"))  # type: ignore[return-value]


def _latent_config(values: _Values) -> dict[str, Any]:
    config: dict[str, Any] = {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 0,
        "first_k_dense_replace": 0,
    }  # fmt: skip
    config |= {field: values.number(key) for key, field in _LATENT_KEYS.items() if key in values}
    head, value = _latent_head(values)
    metadata, prefix = values.file.metadata, values.architecture
    config |= {
        "num_key_value_heads": values.count("attention.head_count"), "v_head_dim": value, "topk_method": "noaux_tc",
        "qk_nope_head_dim": head - values.count("rope.dimension_count"),
        "scoring_func": {1: "softmax", 2: "sigmoid"}.get(values.count("expert_gating_func", 2), "unknown"),
        "norm_topk_prob": values.file.flag(f"{prefix}.expert_weights_norm", True),
    }  # fmt: skip
    scaling: dict[str, Any] = {}
    if values.file.text(f"{prefix}.rope.scaling.type") == "yarn":
        # llama.cpp keeps one number of DeepSeek's two, which are equal in its releases.
        key = "rope.scaling.yarn_log_multiplier"
        scale = _plain_number(round(values.number(key) * 10, 6)) if key in values else 0
        scaling = {"type": "yarn", "mscale": scale, "mscale_all_dim": scale}
        scaling |= {field: values.number(key) for key, field in _YARN_KEYS.items() if key in values}
    if (sections := f"{prefix}.rope.dimension_sections") in metadata:
        scaling["mrope_section"] = _plain(values.file, sections)[:3]
    return {**config, "rope_scaling": scaling or None}


# --------------------------------------------------------------------------------------------------------------------
# The vision part


def check_vision(file: GGUF) -> None:
    """`GGUFError` for a file that is not the vision part of a Keye model."""
    if file.text("general.architecture") != "clip" or not file.flag("clip.has_vision_encoder", False):
        raise GGUFError(f"{file.path} is not the vision part of a model (mmproj); give the mmproj file of this model")
    _check_projector(file)


def _check_projector(file: GGUF) -> None:
    kind = file.text("clip.projector_type") or file.text("clip.vision.projector_type") or ""
    if not kind.lower().startswith(_PROJECTOR_PREFIXES):
        raise GGUFError(
            f"{file.path} is the vision part of another model (projector {kind[:40]!r}); give Keye's mmproj"
        )


def _norms_before_merge(file: GGUF) -> bool:
    """Whether the projector normalises single patches (Preview): its norm is as wide as the tower."""
    norm = _projector_shapes(file).get("mlp_AR.pre_norm.weight")
    return norm is not None and norm[0] == _plain(file, "clip.vision.embedding_length")


def _projector_shapes(file: GGUF) -> dict[str, tuple[int, ...]]:
    shapes = {tensor.name: tensor.shape for tensor in file.tensors.values()}
    recipes = read_vision_recipes(shapes, str(file.path))
    return {name: recipe.shape for name, recipe in recipes.items() if name.startswith("mlp_AR.")}


def _vision_config(file: GGUF, model: GGUF, raw: Mapping[str, Any], release: Release) -> dict[str, Any]:
    values = _Values(file, "clip.vision")
    prefix = "clip.vision."
    config: dict[str, Any] = {
        field: values.count(key.removeprefix(prefix)) for key, field in _VISION_KEYS.items() if key in file.metadata
    }
    _check_layers(file, "v.blk.", values.count("block_count"))
    if "attention.layer_norm_epsilon" in values:
        config["layer_norm_eps"] = values.number("attention.layer_norm_epsilon")
    patch = max(1, config.get("patch_size", 14))
    positions = file.tensors.get("v.position_embd.weight")
    side = 0 if positions is None else math.isqrt(positions.shape[0])
    if side and (config.get("image_size", 0) // patch) != side and side**2 == positions.shape[0]:  # type: ignore[union-attr]
        config["image_size"] = side * patch  # a table of another size than the metadata say
    width = _projector_shapes(file).get("mlp_AR.linear_2.weight", (0,))[0]
    if width != raw["hidden_size"]:
        raise GGUFError(f"{file.path} is the vision part of another model: its tokens have {width} numbers, those of "
                        f"{model.path.name} {raw['hidden_size']}; give the mmproj of this model")  # fmt: skip
    return config
