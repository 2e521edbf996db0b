"""The decoder of Keye-VL-671B-A37B (DeepSeek-V3: latent attention, routed and shared experts) as a config tells it.

Shapes only: keye does not run this decoder yet. Field and tensor names are DeepSeek's; a config.json of the 671B
release has not been seen, so its decoder fields are read where DeepSeek-V3 has them, at the top level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from keye.config import ConfigError
from keye.ops.kv_blocks import RowSpec


@dataclass(frozen=True)
class LatentTextConfig:
    """Every token keeps one latent of `kv_lora_rank` numbers and one rotary key of `qk_rope_head_dim` in each layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    max_position_embeddings: int


def latent_text_config(raw: Mapping[str, Any]) -> LatentTextConfig:
    """Reads the decoder fields of a parsed config.json; `ConfigError` names all that are missing or not whole."""
    names = [field.name for field in fields(LatentTextConfig)]
    if wrong := [name for name in names if type(raw.get(name)) is not int or raw[name] < 0]:
        raise ConfigError(f"config.json lacks {', '.join(wrong)}; the 671B decoder needs whole numbers there")
    return LatentTextConfig(**{name: raw[name] for name in names})


def latent_cache_rows(config: LatentTextConfig) -> dict[str, RowSpec]:
    """What a layer stores of each token, shared by all heads."""
    layers = config.num_hidden_layers
    return {"latent": RowSpec(layers, 1, config.kv_lora_rank), "rope_k": RowSpec(layers, 1, config.qk_rope_head_dim)}


def latent_shapes(config: LatentTextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the decoder's tensors, without the scales of float8 weights and without the draft layer."""
    d = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (d,)
        yield f"{prefix}.post_attention_layernorm.weight", (d,)
        yield from _attention(f"{prefix}.self_attn", config)
        if layer < config.first_k_dense_replace:
            yield from _mlp(f"{prefix}.mlp", d, config.intermediate_size)
            continue
        yield f"{prefix}.mlp.gate.weight", (config.n_routed_experts, d)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
        for expert in range(config.n_routed_experts):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", d, config.moe_intermediate_size)
        shared = config.moe_intermediate_size * config.n_shared_experts
        yield from _mlp(f"{prefix}.mlp.shared_experts", d, shared)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (config.vocab_size, d)


def _attention(prefix: str, config: LatentTextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    yield f"{prefix}.q_a_proj.weight", (config.q_lora_rank, d)
    yield f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,)
    yield f"{prefix}.q_b_proj.weight", (heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), config.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, d)
    yield f"{prefix}.kv_a_layernorm.weight", (latent,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield f"{prefix}.o_proj.weight", (d, heads * config.v_head_dim)


def _mlp(prefix: str, d: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, d)
    yield f"{prefix}.up_proj.weight", (inner, d)
    yield f"{prefix}.down_proj.weight", (d, inner)
