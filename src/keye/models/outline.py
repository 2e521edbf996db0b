"""What a model is made of, from its config.json alone: tensors, parameters by part, bytes of a token in the cache.

Networks are built on the meta device, so no memory is taken; nothing is read but the configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from keye.config import (
    ConfigError,
    KeyeConfig,
    TextConfig,
    VisionConfig,
    architecture_name,
    model_config_from_dict,
    vision_config_from_dict,
)  # fmt: skip
from keye.models.attention import cache_rows
from keye.models.keye import KeyeModel
from keye.models.vision import VisionTower
from keye.ops.kv_blocks import RowSpec
from keye.releases import Release, releases_by_architecture
from keye.weights.names import IGNORED

#: Rows of the packing position table, which official files hold and no forward pass reads.
PACKING_ROWS = 32768
PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
#: Bytes of an indexer key in the official float8 cache, beyond one for each of its numbers: the scale of the vector.
FLOAT8_SCALE_BYTES = 4

#: Parts of a model and the tensors that belong to each; the first match counts.
PARTS = (
    ("packing table (never read)", re.compile(r"\.packing_position_embedding\.")),
    ("pooling head (never read)", re.compile(r"^visual\.vision_model\.head\.")),
    ("vision tower", re.compile(r"^visual\.")),
    ("projector", re.compile(r"^mlp_AR\.")),
    ("embeddings", re.compile(r"\.embed_tokens\.")),
    ("indexer", re.compile(r"\.sa_indexer\.")),
    ("attention", re.compile(r"\.self_attn\.")),
    ("router", re.compile(r"\.mlp\.gate\.")),
    ("experts", re.compile(r"\.mlp\.experts\.")),
    ("shared experts", re.compile(r"\.mlp\.shared_experts\.")),
    ("dense layers", re.compile(r"\.mlp\.")),
    ("norms", re.compile(r"norm\.")),
    ("head", re.compile(r"^lm_head\.")),
    ("other", re.compile(r"")),
)


@dataclass(frozen=True)
class Outline:
    """`shapes` are the tensors of an official checkpoint, `cache_rows` what is stored of each token. `experts` is
    (chosen for a token, all) of a routed layer, None without routing."""

    architecture: str
    release: Release
    shapes: Mapping[str, tuple[int, ...]]
    vision: VisionConfig
    text: Mapping[str, Any]
    context: int
    cache_rows: Mapping[str, RowSpec]
    experts: tuple[int, int] | None
    config: KeyeConfig | None

    @property
    def kv_numbers(self) -> int:
        """Numbers that the cache keeps of one token over all layers, indexer keys left out."""
        return sum(row.layers * row.heads * row.dim for row in self.cache_rows.values() if not row.scanned)

    @property
    def indexer_numbers(self) -> int:
        """Numbers of one token's indexer keys over all layers."""
        return sum(row.layers * row.heads * row.dim for row in self.cache_rows.values() if row.scanned)

    @property
    def indexer_bytes_float8(self) -> int:
        """Bytes of one token's indexer keys in the official float8 cache."""
        keys = sum(row.layers for row in self.cache_rows.values() if row.scanned)
        return self.indexer_numbers + FLOAT8_SCALE_BYTES * keys


def outline(raw: Mapping[str, Any]) -> Outline:
    """The outline of an official `config.json` (already parsed) of any release, the 671B model too."""
    name = architecture_name(raw)
    release = releases_by_architecture()[name]
    text: TextConfig | LatentTextConfig
    if release.runs:
        config = model_config_from_dict(raw)
        text, vision = config.text, config.vision
        with torch.device("meta"):
            shapes = {n: tuple(t.shape) for n, t in KeyeModel(config).state_dict().items()}
        if text.tie_word_embeddings:
            del shapes["lm_head.weight"]
        rows, experts = cache_rows(text), text.num_experts
    else:
        config, text, vision = None, latent_text_config(raw), vision_config_from_dict(raw)
        with torch.device("meta"):
            tower = VisionTower(vision, text.hidden_size).state_dict()
        shapes = {**{n: tuple(t.shape) for n, t in tower.items()}, **dict(latent_shapes(text))}
        rows, experts = latent_cache_rows(text), text.n_routed_experts
    return Outline(
        name, release, {**shapes, PACKING_TABLE: (PACKING_ROWS, vision.hidden_size)}, vision, asdict(text),
        text.max_position_embeddings, rows, (text.num_experts_per_tok, experts) if experts else None, config,
    )  # fmt: skip


def parameters_by_part(shapes: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """Numbers in each part, parts in the order of `PARTS`, empty ones left out."""
    counts = dict.fromkeys((part for part, _ in PARTS), 0)
    for name, shape in shapes.items():
        counts[next(part for part, pattern in PARTS if pattern.search(name))] += math.prod(shape)
    return {part: count for part, count in counts.items() if count}


def read_parameters(shapes: Mapping[str, Iterable[int]]) -> int:
    """Numbers that a forward pass reads: what loading takes into memory."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not IGNORED.search(name))


def active_parameters(parts: Mapping[str, int], experts: tuple[int, int] | None) -> int:
    """Numbers of the decoder that take part in one token: of the routed experts only the chosen ones, of the
    embeddings none (a look-up)."""
    names = ("indexer", "attention", "router", "shared experts", "dense layers", "norms", "head")
    routed = parts.get("experts", 0)
    chosen = routed * experts[0] // experts[1] if experts is not None else routed
    return sum(parts.get(name, 0) for name in names) + chosen


@dataclass(frozen=True)
class LatentTextConfig:
    """The decoder of Keye-VL-671B-A37B (DeepSeek-V3: latent attention, routed and shared experts), which keye does not
    run yet. Every token keeps one latent of `kv_lora_rank` numbers and one rotary key of `qk_rope_head_dim` in each
    layer. Names are DeepSeek's; no config.json of this release has been seen, so the fields are read where DeepSeek-V3
    has them, at the top level."""

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
        attention, heads, latent = f"{prefix}.self_attn", config.num_attention_heads, config.kv_lora_rank
        q_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        yield f"{attention}.q_a_proj.weight", (config.q_lora_rank, d)
        yield f"{attention}.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{attention}.q_b_proj.weight", (heads * q_dim, config.q_lora_rank)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, d)
        yield f"{attention}.kv_a_layernorm.weight", (latent,)
        yield f"{attention}.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
        yield f"{attention}.o_proj.weight", (d, heads * config.v_head_dim)
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


def _mlp(prefix: str, d: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, d)
    yield f"{prefix}.up_proj.weight", (inner, d)
    yield f"{prefix}.down_proj.weight", (d, inner)
