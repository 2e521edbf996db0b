"""One pass of the model over slices of several sequences. Knows tensors and caches, not requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.config import TextConfig
from keye.engine.scheduler import LEAST_TOKENS
from keye.models.attention import AttentionMode, CachedStep, Span
from keye.models.keye import KeyeModel

#: Scratch of the attention kernels for a chunk: the compiled ones take a few MiB at any context.
SCRATCH_BYTES = 8 << 20

#: Which logits of a slice are wanted: none, those after its last token, or those after each.
Wanted = Literal["none", "last", "all"]


@dataclass(frozen=True)
class Slice:
    """New tokens of one sequence: `token_ids` int64 [n], `position_ids` int64 [3, n], and the `visual` tokens [m, d]
    that stand at its placeholders. `alone` slices are computed in a pass of their own."""

    cache: KVCache
    token_ids: Tensor
    position_ids: Tensor
    visual: Tensor | None = None
    wanted: Wanted = "last"
    mode: AttentionMode = "sparse"
    counts: Tensor | None = None
    alone: bool = False


def scratch_bytes(config: TextConfig, rows: int, wanted: int, itemsize: int) -> int:
    """An upper estimate of what a pass over `rows` tokens takes beyond weights and cache: the activations of one layer,
    twice over for what the allocator keeps, `wanted` rows of logits, and the scratch of attention."""
    d, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
    experts = max(1, config.num_experts_per_tok if config.num_experts else 1)
    inner = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    per_row = itemsize * (4 * d + 2 * heads * config.head_dim + experts * (3 * inner + 2 * d)) + 4 * (2 + experts) * d
    return 2 * rows * per_row + 4 * wanted * config.vocab_size + (SCRATCH_BYTES if rows > 1 else 1 << 20)


def smallest_scratch(model: KeyeModel) -> int:
    """What the smallest step takes: the engine keeps so much free of keys and values."""
    return scratch_bytes(model.config.text, LEAST_TOKENS, LEAST_TOKENS, model.dtype.itemsize)


@torch.inference_mode()
def run(model: KeyeModel, slices: Sequence[Slice]) -> list[Tensor | None]:
    """Computes all slices; returns the wanted logits of each, float32 [1 or n, V] on the model's device."""
    out: list[Tensor | None] = [None] * len(slices)
    for group in _passes(slices):
        for place, logits in zip(group, _pass(model, [slices[i] for i in group]), strict=True):
            out[place] = logits
    return out


def _passes(slices: Sequence[Slice]) -> list[list[int]]:
    """Which slices share a pass: those of one attention mode, but for those that want to be alone."""
    groups: dict[object, list[int]] = {}
    for i, one in enumerate(slices):
        groups.setdefault(("alone", i) if one.alone else one.mode, []).append(i)
    return list(groups.values())


def _pass(model: KeyeModel, slices: Sequence[Slice]) -> list[Tensor | None]:
    device = model.device
    ids = torch.cat([one.token_ids for one in slices]).to(device)
    positions = torch.cat([one.position_ids for one in slices], dim=1).to(device)
    x = model.model.embed_tokens(ids)
    spans, start = [], 0
    for one in slices:
        spans.append(Span(start, start + one.token_ids.shape[0], one.cache, one.counts))
        part, start = slice(start, spans[-1].stop), spans[-1].stop
        if one.visual is not None:  # a placeholder elsewhere is a token that a model has drawn, and stands for itself
            x[part] = model.embed(ids[part], one.visual)
    step = CachedStep(spans, model.config.text, mode=slices[0].mode, fixed=slices[0].alone)
    hidden = model(x, positions, step)
    rows = [_rows(span, one.wanted) for span, one in zip(spans, slices, strict=True)]
    chosen = [i for wanted in rows for i in wanted]
    if not chosen:
        return [None] * len(slices)
    if slices[0].alone and slices[0].wanted == "last":
        hidden, chosen = hidden[-1:], [0]  # the head sees one row, whatever the slice was
    logits = model.logits(hidden if len(chosen) == hidden.shape[0] else hidden[chosen])
    parts = logits.split([len(wanted) for wanted in rows])
    return [part if wanted else None for part, wanted in zip(parts, rows, strict=True)]


def _rows(span: Span, wanted: Wanted) -> range:
    if wanted == "none":
        return range(0)
    return range(span.stop - 1 if wanted == "last" else span.start, span.stop)
