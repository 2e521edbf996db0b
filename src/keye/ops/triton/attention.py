"""Attention over rows of KV blocks: over selected keys, and over every earlier key with or without a mask.

Softmax runs over tiles of keys under a running maximum (online softmax, Milakov and Gimelshein, arXiv:1805.02867), sums
in float32. The heads of a group share their keys: they, and in `_dense_kernel` neighbouring queries, are the rows of
one matrix product. Where a launch has few queries, the keys of each are split over several programs and `_merge_kernel`
adds up the parts; how they are split depends on the number of keys alone, never on the batch.

Not run on a card yet: only Triton's interpreter has executed these kernels.

Legend: B queries, H heads, G groups, R = H / G heads of a group, D head dim, K selected keys, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.backend import Stretch
from keye.ops.kv_blocks import KV_BLOCK
from keye.ops.reference import hadamard_transform
from keye.ops.triton.layout import Batch, Pools, tuned
from keye.ops.triton.rows import INTERPRETED, cast, dot_dtype, launch_constants, load_rows, product, row_numbers

#: Selected keys of a tile, and of a part.
SELECTED_TILE: Final = 64
SELECTED_PART: Final = 256
#: Keys of a part in dense attention.
DENSE_PART: Final = 1024
#: Rows (queries x heads) of a matrix product in dense attention, and the fewest that one has.
DENSE_ROWS: Final = 128
FEWEST_ROWS: Final = 16
#: Bytes of the parts of one launch.
SCRATCH_BYTES: Final = 96 * 2**20
_LOG2_E: Final = 1.4426950408889634


@triton.jit
def _online(
    q, k, v, keep, largest, total, sums, scale,
    DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys and values [N, D] to the running softmax of rows [M]; `keep` [M, N] (or [1, N])."""
    s = product(q, tl.trans(k), DOT, INTERPRETED) * scale
    s = tl.where(keep, s, float("-inf"))
    raised = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(raised == float("-inf"), 0.0, raised)  # rows that have seen no key yet
    p = tl.exp2(s - base[:, None])
    rescale = tl.exp2(largest - base)
    total = total * rescale + tl.sum(p, 1)
    sums = sums * rescale[:, None] + product(p, v, DOT, INTERPRETED)
    return raised, total, sums


@triton.jit
def _finish(
    out, part_sums, part_stats, number, parts, part, at, write, largest, total, sums,
    SPLIT: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Writes rows [M, D]: the output at `at`, or a part of it. `number` [M] counts (query, head)."""
    dims = tl.arange(0, D)
    if SPLIT:
        entry = number * parts + part
        tl.store(part_sums + entry[:, None] * D + dims[None, :], sums, mask=write[:, None])
        tl.store(part_stats + entry * 2, largest, mask=write)
        tl.store(part_stats + entry * 2 + 1, total, mask=write)
    else:
        o = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + at[:, None] * D + dims[None, :], cast(o, out.dtype.element_ty, INTERPRETED), mask=write[:, None])


@triton.jit
def _selected_kernel(
    q, out, part_sums, part_stats, selected, row_of, last_of, start_of,
    key_table, keys, key_scales, value_table, values, value_scales, topk, heads, parts, scale,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, SPLIT: tl.constexpr,
    KKIND: tl.constexpr, KROW: tl.constexpr, KHEAD: tl.constexpr, KGROUP: tl.constexpr,
    VKIND: tl.constexpr, VROW: tl.constexpr, VHEAD: tl.constexpr, VGROUP: tl.constexpr,
    DOT: tl.constexpr, KV_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One query, one group, one part of its selected keys, gathered tile by tile."""
    group = tl.program_id(0)
    query = tl.program_id(1)
    part = tl.program_id(2)
    last = tl.load(last_of + query)
    row = tl.load(row_of + query).to(tl.int64)
    lane = tl.arange(0, RP)
    head = group * R + lane
    dims = tl.arange(0, D)
    real = lane < R
    x = tl.load(q + (row * heads + head)[:, None] * D + dims[None, :], mask=real[:, None], other=0.0)
    start = tl.load(start_of + query)
    largest = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    sums = tl.zeros([RP, D], tl.float32)
    # No query has more selected keys than it sees: what follows in its row is -1.
    stop = tl.minimum(topk, last + 1)
    first = 0
    if SPLIT:
        first = part * PART
        stop = tl.minimum(stop, first + PART)
    for tile in range(first, stop, BN):
        index = tile + tl.arange(0, BN)
        position = tl.load(selected + query.to(tl.int64) * topk + index, mask=index < stop, other=-1)
        keep = position >= 0
        position = tl.maximum(position, 0)
        rows = row_numbers(key_table + start, position, keep, KV_BLOCK)
        k = load_rows(keys, key_scales, rows, keep, group, D, KKIND, KROW, KHEAD, KGROUP, INTERPRETED)
        rows = row_numbers(value_table + start, position, keep, KV_BLOCK)
        v = load_rows(values, value_scales, rows, keep, group, D, VKIND, VROW, VHEAD, VGROUP, INTERPRETED)
        largest, total, sums = _online(x, k, v, keep[None, :], largest, total, sums, scale, DOT, INTERPRETED)
    number = query.to(tl.int64) * heads + head
    at = row * heads + head
    write = lane < tl.where(last >= 0, R, 0)
    _finish(
        out, part_sums, part_stats, number, parts, part, at, write, largest, total, sums, SPLIT, D, INTERPRETED
    )  # fmt: skip


@triton.jit
def _dense_kernel(
    q, out, part_sums, part_stats, mask, row_of, last_of, start_of,
    key_table, keys, key_scales, value_table, values, value_scales, mask_width, heads, parts, scale,
    R: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr,
    KKIND: tl.constexpr, KROW: tl.constexpr, KHEAD: tl.constexpr, KGROUP: tl.constexpr,
    VKIND: tl.constexpr, VROW: tl.constexpr, VHEAD: tl.constexpr, VGROUP: tl.constexpr,
    DOT: tl.constexpr, KV_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A block of queries of one sequence, one group, one part of the keys, tile by tile. Rows are (query, head).
    MASKED: a key counts where `mask` uint8 [B, mask_width] is not 0."""
    group = tl.program_id(0)
    block = tl.program_id(1)
    part = tl.program_id(2)
    lane = tl.arange(0, BQ * RP)
    query = block * BQ + lane // RP
    last = tl.load(last_of + query)
    row = tl.load(row_of + query).to(tl.int64)
    head = group * R + lane % RP
    dims = tl.arange(0, D)
    write = (lane % RP < R) & (last >= 0)
    x = tl.load(q + (row * heads + head)[:, None] * D + dims[None, :], mask=write[:, None], other=0.0)
    start = tl.load(start_of + block * BQ)
    largest = tl.full([BQ * RP], float("-inf"), tl.float32)
    total = tl.zeros([BQ * RP], tl.float32)
    sums = tl.zeros([BQ * RP, D], tl.float32)
    limit = tl.max(last, 0) + 1
    first = 0
    stop = limit
    if SPLIT:
        first = part * PART
        stop = tl.minimum(limit, first + PART)
    for tile in range(first, stop, BN):
        position = tile + tl.arange(0, BN)
        inside = position < limit
        rows = row_numbers(key_table + start, position, inside, KV_BLOCK)
        k = load_rows(keys, key_scales, rows, inside, group, D, KKIND, KROW, KHEAD, KGROUP, INTERPRETED)
        rows = row_numbers(value_table + start, position, inside, KV_BLOCK)
        v = load_rows(values, value_scales, rows, inside, group, D, VKIND, VROW, VHEAD, VGROUP, INTERPRETED)
        keep = position[None, :] <= last[:, None]
        if MASKED:
            at = query.to(tl.int64)[:, None] * mask_width + position[None, :]
            keep = keep & (tl.load(mask + at, mask=keep, other=0) != 0)
        largest, total, sums = _online(x, k, v, keep, largest, total, sums, scale, DOT, INTERPRETED)
    number = query.to(tl.int64) * heads + head
    at = row * heads + head
    _finish(
        out, part_sums, part_stats, number, parts, part, at, write, largest, total, sums, SPLIT, D, INTERPRETED
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    part_sums, part_stats, out, row_of, last_of, heads, parts,
    D: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of one (query, head), in order."""
    query = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(last_of + query) >= 0:
        entry = (query.to(tl.int64) * heads + head) * parts
        part = tl.arange(0, PARTS)
        largest = tl.load(part_stats + (entry + part) * 2, mask=part < parts, other=float("-inf"))
        top = tl.max(largest, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        dims = tl.arange(0, D)
        sums = tl.zeros([D], tl.float32)
        total = tl.zeros([], tl.float32)
        for i in range(parts):
            weight = tl.exp2(tl.load(part_stats + (entry + i) * 2) - base)
            total += weight * tl.load(part_stats + (entry + i) * 2 + 1)
            sums += weight * tl.load(part_sums + (entry + i) * D + dims)
        row = tl.load(row_of + query).to(tl.int64)
        o = sums / tl.where(total > 0.0, total, 1.0)
        tl.store(out + (row * heads + head) * D + dims, cast(o, out.dtype.element_ty, INTERPRETED))


_WARPS_AND_STAGES: Final = [(4, 2), (4, 3), (8, 2), (8, 1)]
_SHAPE: Final = ["R", "D", "SPLIT", "KKIND", "VKIND"]
_tuned_selected: Final = tuned(_selected_kernel, _SHAPE, _WARPS_AND_STAGES)
_tuned_dense: Final = tuned(_dense_kernel, [*_SHAPE, "BQ", "MASKED"], _WARPS_AND_STAGES)


def block_queries(ratio: int, dtype: torch.dtype, *, alone: bool) -> int:
    """Queries of a block of dense attention, for `ratio` heads a group. Blocks of few queries are for queries that have
    no neighbours; rows of float32 are half as many, to fit the shared memory."""
    rows = FEWEST_ROWS if alone else DENSE_ROWS if dtype.itemsize == 2 else DENSE_ROWS // 2
    return max(1, rows // triton.next_power_of_2(ratio))


def most_queries(length: int, q: Tensor) -> int:
    """Queries with `length` keys whose parts in dense attention fit the scratch memory; one at least."""
    entries = triton.cdiv(length, DENSE_PART) * q.shape[1] * (q.shape[2] + 2)
    return max(1, SCRATCH_BYTES // (4 * entries))


@dataclass(frozen=True)
class _Parts:
    """Room for `count` parts of each (query, head): sums float32 [B, H, P, D], maxima and totals float32 [B, H, P, 2].
    One part needs none."""

    count: int
    sums: Tensor
    stats: Tensor

    @staticmethod
    def make(count: int, queries: int, q: Tensor) -> "_Parts":
        entries = queries * q.shape[1] * count if count > 1 else 0
        empty = torch.empty(entries, q.shape[2] + 2, dtype=torch.float32, device=q.device)
        flat = empty.view(-1)
        return _Parts(count, flat[: entries * q.shape[2]], flat[entries * q.shape[2] :])

    @property
    def split(self) -> bool:
        return self.count > 1


def attend_selected(q: Tensor, selected: Tensor, batch: Batch, pools: Pools, out: Tensor, *, split: bool) -> None:
    """Attention of the queries of a batch over their sets: `selected` int32 [B, K], ascending, then -1. Writes the rows
    of `out` [T, H, D] that the batch names; `q` [T, H, D] is contiguous. `split` is for few queries."""
    topk, groups = selected.shape[1], pools.k.format.heads
    ratio = q.shape[1] // groups
    parts = _Parts.make(triton.cdiv(topk, SELECTED_PART) if split else 1, batch.queries, q)
    _tuned_selected[(groups, batch.queries, parts.count)](
        q, out, parts.sums, parts.stats, selected, *_where(batch, pools), topk, q.shape[1], parts.count, _scale(q),
        R=ratio, RP=max(FEWEST_ROWS, triton.next_power_of_2(ratio)), BN=_tile(q, SELECTED_TILE), PART=SELECTED_PART,
        SPLIT=parts.split, **_constants(q, pools),
    )  # fmt: skip
    _merge(parts, batch, out)


def attend_tiles(
    q: Tensor, batch: Batch, pools: Pools, out: Tensor, *, split: bool, mask: Tensor | None = None
) -> None:
    """Causal attention of the queries of a batch over every key, or over those where `mask` (bool [B, S]) is true.
    Writes as `attend_selected` does."""
    groups = pools.k.format.heads
    ratio = q.shape[1] // groups
    parts = _Parts.make(triton.cdiv(batch.length, DENSE_PART) if split else 1, batch.queries, q)
    ratio_padded = max(triton.next_power_of_2(ratio), FEWEST_ROWS // batch.block)
    _tuned_dense[(groups, batch.queries // batch.block, parts.count)](
        q, out, parts.sums, parts.stats, batch.last if mask is None else mask.view(torch.uint8),
        *_where(batch, pools), 0 if mask is None else mask.shape[1], q.shape[1], parts.count, _scale(q),
        R=ratio, RP=ratio_padded, BQ=batch.block, BN=_tile(q, KV_BLOCK), PART=DENSE_PART, SPLIT=parts.split,
        MASKED=mask is not None, **_constants(q, pools),
    )  # fmt: skip
    _merge(parts, batch, out)


def rotate_queries(q: Tensor, out: Tensor, pools: Pools) -> tuple[Tensor, Tensor]:
    """Queries and the tensor that kernels write. Keys that are stored Hadamard transformed get queries that are so too:
    dot products stay. Values stored so give outputs that `rotate_outputs` transforms back; until then they are float32
    in a tensor of their own."""
    if pools.k.format.rotated:
        q = hadamard_transform(q)
    return q, torch.empty_like(out, dtype=torch.float32) if pools.v.format.rotated else out


def rotate_outputs(output: Tensor, out: Tensor, stretches: Sequence[Stretch]) -> None:
    """Turns outputs of rotated values back, where they are not in `out` already."""
    if output is not out:
        for stretch in stretches:
            part = slice(stretch.start, stretch.stop)
            out[part] = hadamard_transform(output[part]).to(out.dtype)


def _where(batch: Batch, pools: Pools) -> tuple[Tensor, ...]:
    k, v = pools.k, pools.v
    return (
        batch.rows, batch.last, batch.starts,
        batch.k_table, k.values, k.scales, batch.v_table, v.values, v.scales,
    )  # fmt: skip


def _constants(q: Tensor, pools: Pools) -> dict[str, Any]:
    names = ("KIND", "ROW", "HEAD", "GROUP")
    of_keys = {f"K{name}": value for name, value in zip(names, pools.k.constants, strict=True)}
    of_values = {f"V{name}": value for name, value in zip(names, pools.v.constants, strict=True)}
    dot = dot_dtype(q, pools.k.format)
    if dot_dtype(q, pools.v.format) != dot:
        dot = tl.float32
    return {"D": q.shape[2], "DOT": dot, **of_keys, **of_values, **launch_constants()}


def _scale(q: Tensor) -> float:
    return float(q.shape[2] ** -0.5) * _LOG2_E


def _tile(q: Tensor, keys: int) -> int:
    return keys if q.dtype.itemsize == 2 or INTERPRETED else keys // 2


def _merge(parts: _Parts, batch: Batch, out: Tensor) -> None:
    if parts.split:
        _merge_kernel[(batch.queries, out.shape[1])](
            parts.sums, parts.stats, out, batch.rows, batch.last, out.shape[1], parts.count,
            D=out.shape[2], PARTS=triton.next_power_of_2(parts.count), INTERPRETED=INTERPRETED,
        )  # fmt: skip
