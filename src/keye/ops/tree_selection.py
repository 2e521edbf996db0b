"""Selection of keys in training: the engine's own, on keys that lie in intervals instead of a cache.

A segment becomes a `Stretch` whose indexer keys are read where they are: KV blocks of 64 positions that lie within one
interval are addressed in place, and only blocks that two intervals share are copied. So the scores are those of the
engine to the last bit, and no memory grows with the number of branches of a trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.ops import registry
from keye.ops.backend import Stretch
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat, RowKind
from keye.ops.tree_tiles import Segment

_KINDS: dict[torch.dtype, RowKind] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
}  # fmt: skip
#: Queries whose positions become rows at once.
_CHUNK = 1024


def select_keys(
    q: Tensor, k: Tensor, indexer_q: Tensor, indexer_k: Tensor, gate: Tensor, segments: Sequence[Segment], topk: int
) -> Tensor:
    """The keys that each query attends to, as rows of `k`: int32 [T, K] in the order of a segment's keys, then -1; K is
    `topk`, or the longest segment where that is less. Queries that see at most `topk` keys have them all.

    `q` [T, H, D] and `k` [S, G, D] say which backend the engine would use; they are not read.
    """
    width = max(1, min(topk, max((segment.length for segment in segments), default=1)))
    sets = torch.full((q.shape[0], width), -1, dtype=torch.int32, device=q.device)
    with torch.no_grad():
        long = [segment for segment in segments if segment.length > width]
        if long:
            registry.find_core(q, len(q))  # built now, so that the first step of a run selects as all others do
            indexer_k = indexer_k.detach().contiguous()
            places = _places(tuple(long))
            copies = indexer_k[torch.from_numpy(places.copied).to(q.device)]
            stretches = [
                _stretch(segment, place, k, indexer_k, copies)
                for segment, place in zip(long, places.blocks, strict=True)
            ]
            registry.select_keys(q.detach(), indexer_q.detach(), gate.detach(), stretches, sets)
        for segment in segments:
            if segment.length <= width:
                _fill_causal(sets[segment.start : segment.stop], segment)
            for begin in range(segment.start, segment.stop, _CHUNK):
                _number_rows(sets[begin : min(segment.stop, begin + _CHUNK)], segment)
    return sets


@dataclass(frozen=True)
class _Places:
    """For each segment, its KV blocks: where they begin, in rows, in the keys or (`is_copied`) in the copies. `copied`
    int64 are the rows that the copies hold."""

    copied: NDArray[np.int64]
    blocks: tuple[tuple[NDArray[np.int64], NDArray[np.bool_]], ...]


@lru_cache(maxsize=8)
def _places(segments: tuple[Segment, ...]) -> _Places:
    """The same for every layer of a step."""
    copied: list[NDArray[np.int64]] = []
    blocks = []
    for segment in segments:
        starts, stops = np.array(segment.keys, np.int64).T
        ends = np.cumsum(stops - starts)
        first = np.arange(0, segment.length, KV_BLOCK)
        last = np.minimum(first + KV_BLOCK, segment.length) - 1
        interval = np.searchsorted(ends, first, side="right")
        place = first - ends[interval] + stops[interval]
        is_copied = np.searchsorted(ends, last, side="right") != interval
        for block in is_copied.nonzero()[0]:
            place[block] = len(copied) * KV_BLOCK
            positions = np.minimum(np.arange(first[block], first[block] + KV_BLOCK), last[block])
            inside = np.searchsorted(ends, positions, side="right")
            copied.append(positions - ends[inside] + stops[inside])
        blocks.append((place, is_copied))
    return _Places(np.concatenate(copied) if copied else np.zeros(0, np.int64), tuple(blocks))


def _stretch(
    segment: Segment, place: tuple[NDArray[np.int64], NDArray[np.bool_]], k: Tensor, indexer_k: Tensor, copies: Tensor
) -> Stretch:
    rows, is_copied = place
    form = RowFormat(_KINDS[indexer_k.dtype], 1, indexer_k.shape[1])
    # Attention's own rows are not read by a selection; the format says whether a backend takes them.
    kv = RowFormat(_KINDS[k.dtype], *k.shape[1:])

    def key_tiles(start: int, stop: int) -> Tensor:
        return indexer_k[segment.rows(start, stop, indexer_k.device)]

    if indexer_k.device.type == "cpu" and registry.backends.of(indexer_k.device).name != "triton":
        bases = np.where(is_copied, copies.data_ptr(), indexer_k.data_ptr())
        addresses = torch.from_numpy(bases + rows * form.row_bytes)
        stored = BlockRows(form, addresses)
        blocks = {"k": BlockRows(kv, addresses), "v": BlockRows(kv, addresses), "indexer_k": stored}
    else:
        padded = segment.rows(0, segment.length, indexer_k.device)
        padded = torch.nn.functional.pad(padded, (0, -segment.length % KV_BLOCK))
        pool = indexer_k[padded].view(torch.uint8).view(-1, KV_BLOCK, form.row_bytes)
        table = torch.arange(len(pool), dtype=torch.int32, device=pool.device)
        empty = torch.empty(1, KV_BLOCK, kv.row_bytes, dtype=torch.uint8, device=pool.device)
        other = BlockRows(kv, None, empty, table)
        blocks = {"k": other, "v": other, "indexer_k": BlockRows(form, None, pool, table)}
    return Stretch(segment.start, segment.stop, segment.first, _no_rows, key_tiles, blocks)


def _no_rows(positions: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("a selection reads no keys and values")


def _fill_causal(sets: Tensor, segment: Segment) -> None:
    """Positions of all keys that each query sees."""
    columns = torch.arange(sets.shape[1], dtype=torch.int32, device=sets.device)
    last = segment.first + torch.arange(len(sets), dtype=torch.int32, device=sets.device)
    sets.copy_(columns.where(columns <= last[:, None], -1))


def _number_rows(sets: Tensor, segment: Segment) -> None:
    """Positions to rows of the keys, in place."""
    if segment.keys == ((0, segment.length),):
        return
    rows = segment.rows(0, segment.length, sets.device).to(torch.int32)
    sets.copy_(rows[sets.clamp_min(0).long()].where(sets >= 0, -1))
