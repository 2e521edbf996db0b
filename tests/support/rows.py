"""Cached rows of a model with grouped-query attention, as tests write them."""

from __future__ import annotations

from torch import Tensor

from keye.cache.slabs import KVLayout
from keye.ops.kv_blocks import RowFormat


def kv_rows(k: Tensor, v: Tensor, indexer_k: Tensor | None = None) -> dict[str, Tensor]:
    """What a layer appends: `k`, `v` [n, G, D] and, in sparse models, `indexer_k` [n, I]."""
    rows = {"k": k, "v": v}
    return rows if indexer_k is None else {**rows, "indexer_k": indexer_k.unsqueeze(1)}


def kv_layout(layers: int, rows: RowFormat, indexer: RowFormat | None = None) -> KVLayout:
    """Keys and values of one format and, in sparse models, indexer keys."""
    if indexer is None:
        return KVLayout(layers, {"k": rows, "v": rows})
    return KVLayout(layers, {"k": rows, "v": rows, "indexer_k": indexer}, ("indexer_k",))
