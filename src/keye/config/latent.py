"""Reading the decoder of Keye-VL-671B-A37B from its `config.json`: the fields of DeepSeek-V3, at the top level.

No config.json of this release was ever seen. So fields that decide what is computed are required, and whatever asks for
something that keye does not compute is an error; fields that change nothing are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from keye.config.files import ConfigError, check_fields, require
from keye.config.text import GroupRouting, LatentConfig, TextConfig, YarnConfig

_SIZES: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "n_group", "topk_group", "max_position_embeddings",
)  # fmt: skip
_COUNTS: Final = ("n_shared_experts", "first_k_dense_replace")
#: Fields that must be there, beside `q_lora_rank`, which may be null.
LATENT_REQUIRED: Final = (*_SIZES, *_COUNTS, "rope_theta", "routed_scaling_factor", "norm_topk_prob")
_KINDS: Final = {
    "size": (*_SIZES, "q_lora_rank", "moe_layer_freq"),
    "count": (*_COUNTS, "num_nextn_predict_layers"),
    "positive": ("rope_theta", "rms_norm_eps", "routed_scaling_factor"),
    "flag": ("norm_topk_prob", "attention_bias", "tie_word_embeddings"),
}
#: What keye computes, for fields that name a method; a missing one means the same.
_METHODS: Final = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu"}
#: Keys of DeepSeek's files that carry no information for the forward pass, beside those of all releases.
_INERT: Final = frozenset(
    "aux_loss_alpha ep_size num_key_value_heads pretraining_tp qk_head_dim quantization_config rope_interleave "
    "seq_aux".split()
)
#: Every key that has a meaning here.
LATENT_FIELDS: Final = frozenset(
    (*LATENT_REQUIRED, *(name for names in _KINDS.values() for name in names), *_METHODS)
) | (_INERT)
_ROPE_TYPES: Final = (None, "default", "mrope", "yarn")
_YARN_REQUIRED: Final = ("factor", "original_max_position_embeddings")
_YARN_KINDS: Final = {
    "positive": ("factor", "beta_fast", "beta_slow"),
    "size": ("original_max_position_embeddings",),
    "scale": ("mscale", "mscale_all_dim"),
}
_ROPE_FIELDS: Final = frozenset(
    ("type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved", "attention_factor", "truncate",
     *(name for names in _YARN_KINDS.values() for name in names))
)  # fmt: skip


def read_latent_text(raw: Mapping[str, Any]) -> TextConfig:
    """The decoder of a parsed config.json that has every required field. `ConfigError` for the first value that is
    wrong, contradicts another or asks for what keye does not compute."""
    check_fields("config.json", raw, _KINDS, required=LATENT_REQUIRED)
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json has rope_scaling {scaling!r}; it must be an object")
    for problem in (*_problems(raw), *_rope_problems(raw, scaling)):
        raise ConfigError(problem)
    nope, rope = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"]
    # DeepSeek counts layers from 0: the first ones are dense, and of the others each `moe_layer_freq`-th routes.
    frequency, first = raw.get("moe_layer_freq") or 1, raw["first_k_dense_replace"]
    dense = tuple(i for i in range(raw["num_hidden_layers"]) if i < first or i % frequency)
    section = scaling.get("mrope_section")
    return TextConfig(
        **{name: raw[name] for name in _SIZES[:5]},
        num_key_value_heads=raw["num_attention_heads"],
        head_dim=nope + rope,
        rope_theta=raw["rope_theta"],
        mrope_section=tuple(section) if section else (rope // 2, 0, 0),
        uses_mrope=bool(section),
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw.get("rms_norm_eps") or 1e-6,
        attention_bias=bool(raw.get("attention_bias")),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        num_experts=raw["n_routed_experts"],
        num_experts_per_tok=raw["num_experts_per_tok"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        norm_topk_prob=raw["norm_topk_prob"],
        mlp_only_layers=dense,
        latent=LatentConfig(raw["kv_lora_rank"], nope, rope, raw["v_head_dim"], raw.get("q_lora_rank")),
        group_routing=GroupRouting(raw["n_group"], raw["topk_group"], float(raw["routed_scaling_factor"])),
        n_shared_experts=raw["n_shared_experts"],
        yarn=_yarn(scaling),
        draft_layers=raw.get("num_nextn_predict_layers") or 0,
    )


def _yarn(scaling: Mapping[str, Any]) -> YarnConfig | None:
    if "yarn" not in (scaling.get("type"), scaling.get("rope_type")):
        return None
    names = (name for names in _YARN_KINDS.values() for name in names)
    return YarnConfig(**{name: scaling[name] for name in names if scaling.get(name) is not None})


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Contradictions, and methods that keye does not compute."""
    if "q_lora_rank" not in raw:
        yield "config.json lacks q_lora_rank, which is null where queries have no latent"
    for name, known in _METHODS.items():
        if raw.get(name) not in (None, known):
            yield f"{name} is {raw[name]!r}; the decoder of DeepSeek-V3 has {known}"
    heads, experts, groups = raw["num_attention_heads"], raw["n_routed_experts"], raw["n_group"]
    if raw.get("num_key_value_heads") not in (None, heads):
        yield (f"num_key_value_heads {raw['num_key_value_heads']} differs from num_attention_heads {heads}; latent "
               "attention expands keys and values for every head")  # fmt: skip
    if raw.get("rope_interleave") is False:
        yield "rope_interleave is false; only DeepSeek's layout of interleaved pairs is supported"
    if raw["qk_rope_head_dim"] % 2:
        yield f"qk_rope_head_dim {raw['qk_rope_head_dim']} must be even: rotary dimensions are pairs"
    if experts % groups or experts // groups < 2:
        yield f"n_group {groups} must divide n_routed_experts {experts} into groups of at least 2"
    elif not raw["topk_group"] <= groups:
        yield f"topk_group {raw['topk_group']} must be at most n_group {groups}"
    elif raw["num_experts_per_tok"] > (open_experts := experts // groups * raw["topk_group"]):
        yield f"num_experts_per_tok {raw['num_experts_per_tok']} is more than the {open_experts} experts of topk_group"


def _rope_problems(raw: Mapping[str, Any], scaling: Mapping[str, Any]) -> Iterator[str]:
    """What the rotary embedding asks for and keye does not compute."""
    for name in ("type", "rope_type"):
        if scaling.get(name) not in _ROPE_TYPES:
            yield f"rope_scaling.{name} is {scaling[name]!r}; only yarn, mrope and default are implemented"
    if unknown := sorted(map(str, set(scaling) - _ROPE_FIELDS)):
        yield f"rope_scaling has {', '.join(unknown)}, which keye does not know; it may change the rotary embedding"
    if scaling.get("rope_theta") not in (None, raw["rope_theta"]):
        yield f"rope_scaling.rope_theta {scaling['rope_theta']!r} differs from rope_theta {raw['rope_theta']!r}"
    if scaling.get("attention_factor") is not None or scaling.get("truncate") not in (None, True):
        yield "rope_scaling has attention_factor or truncate, which DeepSeek-V3 does not have; remove them"
    if scaling.get("mrope_interleaved"):
        yield "rope_scaling.mrope_interleaved is true; only the contiguous M-RoPE layout is supported"
    if "yarn" in (scaling.get("type"), scaling.get("rope_type")):
        require(scaling, _YARN_REQUIRED, "rope_scaling")
        check_fields("rope_scaling", scaling, _YARN_KINDS, required=_YARN_REQUIRED)
    elif scaling.get("factor") not in (None, 1):
        yield f"rope_scaling.factor is {scaling['factor']!r} without a type; only yarn stretches positions"
    if scaling.get("mrope_section") is not None:
        check_fields("rope_scaling", scaling, {"three sizes": ("mrope_section",)})
        section, rope = list(scaling["mrope_section"]), raw["qk_rope_head_dim"]
        if sum(section) * 2 != rope or min(section) < 0:
            yield f"mrope_section {section} must sum to qk_rope_head_dim/2 = {rope // 2}"
