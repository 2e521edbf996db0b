"""What a model is made of, from its config.json alone: tensors, parameters by part, bytes of a token in the cache.

Networks are built on the meta device, so no memory is taken; nothing is read but the configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from keye.config import KeyeConfig, VisionConfig, model_config_from_dict
from keye.models.attention import cache_rows
from keye.models.keye import KeyeModel
from keye.ops.kv_blocks import RowSpec
from keye.quant.policy import PARTS as QUANTISED_PARTS
from keye.releases import Release
from keye.weights.names import IGNORED

#: Rows of the packing position table, which official files hold and no forward pass reads.
PACKING_ROWS = 32768
PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
#: Bytes of an indexer key in the official float8 cache, beyond one for each of its numbers: the scale of the vector.
FLOAT8_SCALE_BYTES = 4

#: Parts of a model and the tensors that belong to each; the first match counts. Those with matrices are the parts that
#: quantisation knows.
PARTS = (
    ("packing table (never read)", re.compile(r"\.packing_position_embedding\.")),
    ("pooling head (never read)", re.compile(r"^visual\.vision_model\.head\.")),
    *QUANTISED_PARTS,
    ("router", re.compile(r"\.mlp\.gate\.")),
    ("norms", re.compile(r"norm\.")),
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
    config: KeyeConfig

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
    """The outline of an official `config.json` (already parsed) of any release. The scales of quantised weights and
    draft layers are left out."""
    config = model_config_from_dict(raw)
    text, vision = config.text, config.vision
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in KeyeModel(config).state_dict().items()}
    if text.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if config.has_vision:
        shapes[PACKING_TABLE] = (PACKING_ROWS, vision.hidden_size)
    experts = (text.num_experts_per_tok, text.num_experts) if text.num_experts else None
    return Outline(
        config.architecture, config.release, shapes, vision, asdict(text), text.max_position_embeddings,
        cache_rows(text), experts, config,
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
