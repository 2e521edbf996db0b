"""Which keys the indexer keeps: scores over paged keys, then an exact, ordered top-k.

The k largest of a row are found without sorting it:

1. `_score_kernel` writes the scores of a few queries as integers in the order of the numbers, and the largest of every
   GROUP neighbouring keys (the peaks).
2. The k-th largest peak is a floor of the k-th largest score: k keys reach it. At most (k - 1) * GROUP keys exceed it.
3. Those keys, and the first ones that equal the floor if k do not exceed it, are collected in order.
4. Among them the k-th largest is found bit by bit, and the k kept are written in order; of equal ones the first.

Scores of one slice of queries and the keys collected are the scratch memory: `SCRATCH_BYTES` at most, at any length up
to the one at which a single query needs more. Every integer step has one right answer, so that only the scores can
depend on the card.

Not run on a card yet: only Triton's interpreter has executed these kernels.

Legend: B queries, J indexer heads, I indexer dim, K selected keys.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.reference import round_queries
from keye.ops.triton.layout import Batch, tuned
from keye.ops.triton.rows import INTERPRETED, Operand, dot_dtype, launch_constants, load_rows, product, row_numbers

#: Bytes of scores, peaks and collected keys at once.
SCRATCH_BYTES: Final = 96 * 2**20
#: Neighbouring keys that have one peak. Larger ones make fewer peaks and a lower floor.
GROUP: Final = 16
#: Keys that one program collects, and that it reads at once.
CHUNK: Final = 4096
TILE: Final = 1024
#: Queries of one program of selection: on a card one, in the interpreter as many as make its overhead bearable.
ROWS: Final = 32 if INTERPRETED else 1
#: Keys of a matrix product, and keys that one program scores.
SCORE_TILE: Final = 128
SCORE_CHUNK: Final = 1024
#: Columns (queries x heads) of a matrix product: of neighbouring queries, and of one query alone.
SCORE_COLUMNS: Final = 128
FEWEST_COLUMNS: Final = 16
#: Of no key: below every score.
_NONE: Final = tl.constexpr(-(2**31))


@triton.jit
def _score_kernel(
    q, gate, row_of, last_of, start_of, table, values, scales, scores, peaks, width, heads,
    BQ: tl.constexpr, JP: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr, SCALES: tl.constexpr,
    DOT: tl.constexpr, KV_BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Scores of BQ queries of one sequence against CHUNK keys: int32 [B, width] and their peaks [B, width / GROUP].

    Keys are the rows of the product and (query, head) its columns, so that one query alone wastes nothing and its sums
    are those that it has among others.
    """
    block = tl.program_id(0)
    begin = tl.program_id(1) * CHUNK
    queries = block * BQ + tl.arange(0, BQ)
    last = tl.load(last_of + queries)
    limit = tl.max(last, 0) + 1
    if begin < limit:
        columns = tl.arange(0, BQ * JP)
        head = columns % JP
        row = tl.load(row_of + block * BQ + columns // JP).to(tl.int64)
        real = head < heads
        dims = tl.arange(0, D)
        x = tl.load(q + (row * heads + head)[None, :] * D + dims[:, None], mask=real[None, :], other=0.0)
        weight = tl.load(gate + row * heads + head, mask=real, other=0.0)
        blocks = table + tl.load(start_of + block * BQ)
        stop = tl.minimum(begin + CHUNK, limit)
        for tile in range(begin, stop, BK):
            positions = tile + tl.arange(0, BK)
            keep = positions < limit
            rows = row_numbers(blocks, positions, keep, KV_BLOCK)
            k = load_rows(values, scales, rows, keep, 0, D, KIND, ROW, HEAD, SCALES, INTERPRETED)
            s = tl.maximum(product(k, x, DOT, INTERPRETED), 0.0) * weight[None, :]
            s = tl.sum(tl.reshape(s, [BK, BQ, JP]), 2)
            s = tl.where(s == 0.0, 0.0, s)  # of the two zeros the positive one
            bits = s.to(tl.int32, bitcast=True)
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            ordered = tl.where(positions[:, None] <= last[None, :], ordered, _NONE)
            at = queries.to(tl.int64)[None, :] * width
            tl.store(scores + at + positions[:, None], ordered)
            best = tl.max(tl.reshape(ordered, [BK // GROUP, GROUP, BQ]), 1)
            groups = tile // GROUP + tl.arange(0, BK // GROUP)
            tl.store(peaks + at // GROUP + groups[:, None], best)


@triton.jit
def _kth_largest(rows, count, topk, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The topk-th largest of the first `count` int32 [ROWS] at each of `rows`: bit by bit from the highest, the largest
    number that topk entries reach. Where there are no more than topk, no floor is needed: _NONE."""
    stop = tl.max(count, 0)
    largest = tl.full([ROWS], _NONE, tl.int32)
    unit = tl.full([ROWS], 1, tl.int32)
    zero = tl.zeros([ROWS, TILE], tl.int32)
    lanes = tl.arange(0, TILE)[None, :]
    if stop > topk:
        for i in range(32):
            # Bits of `largest` that are not decided are 0 and the sign is 1: flipping bit 31 - i raises the number.
            attempt = largest ^ (unit << (31 - i))
            reached = zero
            for tile in range(0, stop, TILE):
                index = tile + lanes
                x = tl.load(rows[:, None] + index, mask=index < count[:, None], other=_NONE)
                reached += (x >= attempt[:, None]).to(tl.int32)
            largest = tl.where(tl.sum(reached, 1) >= topk, attempt, largest)
    return tl.where(count > topk, largest, _NONE)


@triton.jit
def _floor_kernel(
    peaks, last_of, floors, queries, width, topk, ROWS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """A floor of the topk-th largest score of each query."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = (tl.load(last_of + row, mask=row < queries, other=-1) + GROUP) // GROUP
    floor = _kth_largest(peaks + row.to(tl.int64) * width, count, topk, ROWS, TILE)
    tl.store(floors + row, floor, mask=row < queries)


@triton.jit
def _count_kernel(
    scores, last_of, floors, above, equal, queries, width, chunks,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many scores of each chunk exceed the floor of their row, and how many equal it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    real = row < queries
    floor = tl.load(floors + row, mask=real, other=0)[:, None]
    count = tl.load(last_of + row, mask=real, other=-1) + 1
    rows = (scores + row.to(tl.int64) * width)[:, None]
    higher = tl.zeros([ROWS, TILE], tl.int32)
    same = tl.zeros([ROWS, TILE], tl.int32)
    for tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tl.max(count, 0)), TILE):
        index = tile + tl.arange(0, TILE)[None, :]
        x = tl.load(rows + index, mask=index < count[:, None], other=_NONE)
        higher += (x > floor).to(tl.int32)
        same += ((x == floor) & (x > _NONE)).to(tl.int32)
    tl.store(above + row * chunks + chunk, tl.sum(higher, 1), mask=real)
    tl.store(equal + row * chunks + chunk, tl.sum(same, 1), mask=real)


@triton.jit
def _take(x, least, seen, wanted):
    """Which of a tile [ROWS, TILE] are kept: those above `least`, and of those that equal it the first ones, until
    `wanted` of them were `seen`. Returns them, how many equal it, and the rank of each among those kept."""
    equals = ((x == least[:, None]) & (x > _NONE)).to(tl.int32)
    take = (x > least[:, None]) | ((equals > 0) & (seen[:, None] + tl.cumsum(equals, 1) <= wanted[:, None]))
    ranks = tl.cumsum(take.to(tl.int32), 1)
    return take, tl.sum(equals, 1), ranks


@triton.jit
def _collect_kernel(
    scores, last_of, floors, above, equal, collected, where, counts, queries, width, room, chunks, topk,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores and positions of the keys that may be among the topk, in order: `collected`, `where` int32 [B, room]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    real = row < queries
    each = tl.arange(0, CHUNKS)[None, :]
    stored = real[:, None] & (each < chunks)
    higher = tl.load(above + row[:, None] * chunks + each, mask=stored, other=0)
    same = tl.load(equal + row[:, None] * chunks + each, mask=stored, other=0)
    total = tl.sum(higher, 1)
    wanted = tl.maximum(topk - total, 0)
    seen = tl.sum(tl.where(each < chunk, same, 0), 1)
    place = tl.sum(tl.where(each < chunk, higher, 0), 1) + tl.minimum(seen, wanted)
    tl.store(counts + row, total + tl.minimum(tl.sum(same, 1), wanted), mask=row < tl.where(chunk == 0, queries, 0))
    floor = tl.load(floors + row, mask=real, other=0)
    count = tl.load(last_of + row, mask=real, other=-1) + 1
    long_row = row.to(tl.int64)
    for tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tl.max(count, 0)), TILE):
        index = tile + tl.arange(0, TILE)[None, :]
        x = tl.load(scores + (long_row * width)[:, None] + index, mask=index < count[:, None], other=_NONE)
        take, equals, ranks = _take(x, floor, seen, wanted)
        at = (long_row * room + place)[:, None] + ranks - 1
        tl.store(collected + at, x, mask=take)
        tl.store(where + at, tl.broadcast_to(index, [ROWS, TILE]), mask=take)
        seen += equals
        place += tl.max(ranks, 1)


@triton.jit
def _keep_kernel(
    collected, where, counts, selected, queries, room, topk, ROWS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The topk of the collected keys, in order, then -1: `selected` int32 [B, topk]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < queries
    count = tl.load(counts + row, mask=real, other=0)
    stop = tl.max(count, 0)
    long_row = row.to(tl.int64)
    least = _kth_largest(collected + long_row * room, count, topk, ROWS, TILE)
    lanes = tl.arange(0, TILE)[None, :]
    rows = (long_row * room)[:, None]
    higher = tl.zeros([ROWS, TILE], tl.int32)
    for tile in range(0, stop, TILE):
        index = tile + lanes
        x = tl.load(collected + rows + index, mask=index < count[:, None], other=_NONE)
        higher += (x > least[:, None]).to(tl.int32)
    wanted = topk - tl.sum(higher, 1)
    seen = tl.zeros([ROWS], tl.int32)
    place = tl.zeros([ROWS], tl.int32)
    for tile in range(0, stop, TILE):
        index = tile + lanes
        x = tl.load(collected + rows + index, mask=index < count[:, None], other=_NONE)
        take, equals, ranks = _take(x, least, seen, wanted)
        at = (long_row * topk + place)[:, None] + ranks - 1
        tl.store(selected + at, tl.load(where + rows + index, mask=take, other=0), mask=take)
        seen += equals
        place += tl.max(ranks, 1)
    nothing = tl.full([ROWS, TILE], -1, tl.int32)
    for tile in range(0, topk, TILE):
        index = tile + lanes
        fill = (index >= place[:, None]) & (index < topk) & real[:, None]
        tl.store(selected + (long_row * topk)[:, None] + index, nothing, mask=fill)


@triton.jit
def _tally_kernel(selected, counts, total, TILE: tl.constexpr):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(selected + index, mask=index < total, other=-1)
    tl.atomic_add(counts + position, tl.full([TILE], 1, tl.int64), mask=position >= 0)


_tuned_scores: Final = tuned(_score_kernel, ["BQ", "JP", "D", "KIND"], [(4, 2), (4, 3), (8, 2), (8, 3)])


@dataclass(frozen=True)
class Room:
    """What one query of a batch needs, in entries of int32: scores and peaks for `width` keys, `room` collected keys
    with their positions, and the set itself."""

    width: int
    room: int
    topk: int

    @staticmethod
    def of(length: int, topk: int) -> "Room":
        """For queries that see up to `length` keys."""
        width = triton.cdiv(length, SCORE_TILE) * SCORE_TILE
        return Room(width, min(width, topk * GROUP), topk)

    @property
    def nbytes(self) -> int:
        """Scratch memory of a query."""
        return 4 * (self.width + self.width // GROUP + 2 * self.room + self.topk)


def most_queries(length: int, topk: int, block: int = 1) -> int:
    """Queries of one launch that see up to `length` keys and fit the scratch budget: complete blocks, at least one."""
    return max(block, SCRATCH_BYTES // Room.of(length, topk).nbytes // block * block)


def block_queries(indexer_q: Tensor, *, alone: bool) -> int:
    """Queries of one matrix product, for `indexer_q` [T, J, I]: as many as its columns hold, or, for queries that have
    no neighbours, as few as a product can have."""
    many = SCORE_COLUMNS if indexer_q.dtype.itemsize == 2 else SCORE_COLUMNS // 2
    return max(1, (FEWEST_COLUMNS if alone else many) // triton.next_power_of_2(indexer_q.shape[1]))


def select_rows(indexer_q: Tensor, gate: Tensor, batch: Batch, keys: Operand, topk: int) -> Tensor:
    """The sets of every query of a batch, int32 [B, topk]: ascending positions, then -1.

    `indexer_q` [T, J, I], `gate` float32 [T, J], both contiguous; the batch says which of their rows are meant.
    """
    if keys.format.kind == "int8":
        indexer_q = round_queries(indexer_q)
    need, B, device = Room.of(batch.length, topk), batch.queries, indexer_q.device
    heads, dim = indexer_q.shape[1:]
    padded_heads = max(triton.next_power_of_2(heads), FEWEST_COLUMNS // batch.block)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    scores, peaks = integers(B, need.width), integers(B, need.width // GROUP)
    kind, row, head, group = keys.constants
    grid = (B // batch.block, triton.cdiv(batch.length, SCORE_CHUNK))
    tile = SCORE_TILE if indexer_q.dtype.itemsize == 2 else SCORE_TILE // 2
    _tuned_scores[grid](
        indexer_q, gate, batch.rows, batch.last, batch.starts, batch.indexer_table, keys.values, keys.scales,
        scores, peaks, need.width, heads, BQ=batch.block, JP=padded_heads, D=dim, BK=tile, CHUNK=SCORE_CHUNK,
        GROUP=GROUP, KIND=kind, ROW=row, HEAD=head, SCALES=group, DOT=dot_dtype(indexer_q, keys.format),
        **launch_constants(),
    )  # fmt: skip
    return _topk(scores, peaks, batch, need)


def _topk(scores: Tensor, peaks: Tensor, batch: Batch, need: Room) -> Tensor:
    """Steps 2 to 4 of the module's docstring."""
    B, chunks = batch.queries, triton.cdiv(batch.length, CHUNK)
    floors, counts = scores.new_empty(B), scores.new_empty(B)
    above, equal = scores.new_empty(B, chunks), scores.new_empty(B, chunks)
    collected, where = scores.new_empty(B, need.room), scores.new_empty(B, need.room)
    selected = scores.new_empty(B, need.topk)
    blocks = triton.cdiv(B, ROWS)
    tiles = {"ROWS": ROWS, "TILE": TILE}
    _floor_kernel[(blocks,)](peaks, batch.last, floors, B, need.width // GROUP, need.topk, GROUP=GROUP, **tiles)
    _count_kernel[(blocks, chunks)](
        scores, batch.last, floors, above, equal, B, need.width, chunks, CHUNK=CHUNK, **tiles
    )  # fmt: skip
    _collect_kernel[(blocks, chunks)](
        scores, batch.last, floors, above, equal, collected, where, counts, B, need.width, need.room, chunks, need.topk,
        CHUNKS=triton.next_power_of_2(chunks), CHUNK=CHUNK, **tiles,
    )  # fmt: skip
    _keep_kernel[(blocks,)](collected, where, counts, selected, B, need.room, need.topk, **tiles)
    return selected


def tally(selected: Tensor, counts: Tensor) -> None:
    """Adds one to `counts` (int64) at every position of `selected` (int32), without waiting for the card."""
    total = selected.numel()
    _tally_kernel[(triton.cdiv(total, TILE),)](selected, counts, total, TILE=TILE)
