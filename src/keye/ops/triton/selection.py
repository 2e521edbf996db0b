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

from keye.ops.triton.layout import Batch, tuned
from keye.ops.triton.rows import Operand, dot_dtype, launch_constants, load_rows, product, row_numbers

#: Bytes of scores, peaks and collected keys at once.
SCRATCH_BYTES: Final = 96 * 2**20
#: Neighbouring keys that have one peak. Larger ones make fewer peaks and a lower floor.
GROUP: Final = 16
#: Keys that one program collects, and that it reads at once.
CHUNK: Final = 4096
TILE: Final = 1024
#: Keys of a matrix product, and keys that one program scores.
SCORE_TILE: Final = 128
SCORE_CHUNK: Final = 1024
#: Columns (queries x heads) of a matrix product: of neighbouring queries, and of one query alone.
SCORE_COLUMNS: Final = 128
FEWEST_COLUMNS: Final = 16
#: Of no key: below every score.
_NONE: Final = tl.constexpr(-(2**31))


# --------------------------------------------------------------------------------------------------------------------
# Scores


@triton.jit
def _score_kernel(
    q, gate, row_of, last_of, start_of, table, values, scales, scores, peaks, width, heads,
    BQ: tl.constexpr, JP: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr, SCALES: tl.constexpr,
    DOT: tl.constexpr, PAGE: tl.constexpr, INTERPRETED: tl.constexpr,
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
        pages = table + tl.load(start_of + block * BQ)
        stop = tl.minimum(begin + CHUNK, limit)
        for tile in range(begin, stop, BK):
            positions = tile + tl.arange(0, BK)
            keep = positions < limit
            rows = row_numbers(pages, positions, keep, PAGE)
            k = load_rows(values, scales, rows, keep, 0, D, KIND, ROW, HEAD, SCALES)
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


# --------------------------------------------------------------------------------------------------------------------
# The k largest


@triton.jit
def _kth_largest(row, count, topk, TILE: tl.constexpr):
    """The topk-th largest of `count` int32 at `row`: bit by bit from the highest, the largest number that topk entries
    reach. Where there are no more than topk, nothing has to be told apart: _NONE."""
    found = tl.full([], _NONE, tl.int32)
    if count > topk:
        for i in range(32):
            # Bits of `found` that are not decided are 0 and the sign is 1: turning one around raises the number.
            attempt = found ^ (tl.full([], 1, tl.int32) << (31 - i))
            reached = tl.zeros([TILE], tl.int32)
            for tile in range(0, count, TILE):
                index = tile + tl.arange(0, TILE)
                x = tl.load(row + index, mask=index < count, other=_NONE)
                reached += (x >= attempt).to(tl.int32)
            found = tl.where(tl.sum(reached, 0) >= topk, attempt, found)
    return found


@triton.jit
def _floor_kernel(peaks, last_of, floors, width, topk, TILE: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0)
    count = (tl.load(last_of + row) + GROUP) // GROUP
    floor = _kth_largest(peaks + row.to(tl.int64) * width, count, topk, TILE)
    tl.store(floors + row, floor)


@triton.jit
def _count_kernel(scores, last_of, floors, above, equal, width, chunks, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """How many scores of each chunk exceed the floor of their row, and how many equal it."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    floor = tl.load(floors + row)
    count = tl.load(last_of + row) + 1
    higher = tl.zeros([TILE], tl.int32)
    same = tl.zeros([TILE], tl.int32)
    for tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, count), TILE):
        index = tile + tl.arange(0, TILE)
        x = tl.load(scores + row.to(tl.int64) * width + index, mask=index < count, other=_NONE)
        higher += (x > floor).to(tl.int32)
        same += ((x == floor) & (x > _NONE)).to(tl.int32)
    tl.store(above + row * chunks + chunk, tl.sum(higher, 0))
    tl.store(equal + row * chunks + chunk, tl.sum(same, 0))


@triton.jit
def _collect_kernel(
    scores, last_of, floors, above, equal, found, where, counts, width, room, chunks, topk,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores and positions of the keys that may be among the topk, in order: `found`, `where` int32 [B, room]."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    each = tl.arange(0, CHUNKS)
    higher = tl.load(above + row * chunks + each, mask=each < chunks, other=0)
    same = tl.load(equal + row * chunks + each, mask=each < chunks, other=0)
    total = tl.sum(higher, 0)
    wanted = tl.maximum(topk - total, 0)
    seen = tl.sum(tl.where(each < chunk, same, 0), 0)
    place = tl.sum(tl.where(each < chunk, higher, 0), 0) + tl.minimum(seen, wanted)
    if chunk == 0:
        tl.store(counts + row, total + tl.minimum(tl.sum(same, 0), wanted))
    floor = tl.load(floors + row)
    count = tl.load(last_of + row) + 1
    for tile in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, count), TILE):
        index = tile + tl.arange(0, TILE)
        x = tl.load(scores + row.to(tl.int64) * width + index, mask=index < count, other=_NONE)
        equals = ((x == floor) & (x > _NONE)).to(tl.int32)
        take = (x > floor) | ((equals > 0) & (seen + tl.cumsum(equals, 0) <= wanted))
        at = row.to(tl.int64) * room + place + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(found + at, x, mask=take)
        tl.store(where + at, index, mask=take)
        seen += tl.sum(equals, 0)
        place += tl.sum(take.to(tl.int32), 0)


@triton.jit
def _keep_kernel(found, where, counts, selected, room, topk, TILE: tl.constexpr):
    """The topk of the collected keys, in order, then -1: `selected` int32 [B, topk]."""
    row = tl.program_id(0)
    count = tl.load(counts + row)
    found += row.to(tl.int64) * room
    where += row.to(tl.int64) * room
    selected += row.to(tl.int64) * topk
    least = _kth_largest(found, count, topk, TILE)
    higher = tl.zeros([TILE], tl.int32)
    for tile in range(0, count, TILE):
        index = tile + tl.arange(0, TILE)
        higher += (tl.load(found + index, mask=index < count, other=_NONE) > least).to(tl.int32)
    wanted = topk - tl.sum(higher, 0)
    seen = tl.zeros([], tl.int32)
    place = tl.zeros([], tl.int32)
    for tile in range(0, count, TILE):
        index = tile + tl.arange(0, TILE)
        x = tl.load(found + index, mask=index < count, other=_NONE)
        equals = ((x == least) & (index < count)).to(tl.int32)
        take = (x > least) | ((equals > 0) & (seen + tl.cumsum(equals, 0) <= wanted))
        at = place + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(selected + at, tl.load(where + index, mask=take, other=0), mask=take)
        seen += tl.sum(equals, 0)
        place += tl.sum(take.to(tl.int32), 0)
    for tile in range(0, topk, TILE):
        index = tile + tl.arange(0, TILE)
        tl.store(selected + index, tl.full([TILE], -1, tl.int32), mask=(index >= place) & (index < topk))


@triton.jit
def _tally_kernel(selected, counts, total, TILE: tl.constexpr):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(selected + index, mask=index < total, other=-1)
    tl.atomic_add(counts + position, tl.full([TILE], 1, tl.int64), mask=position >= 0)


# --------------------------------------------------------------------------------------------------------------------
# From the host

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
    """Queries of one launch whose scratch memory fits the budget, when they see up to `length` keys: whole blocks, and
    one at least."""
    return max(block, SCRATCH_BYTES // Room.of(length, topk).nbytes // block * block)


def block_queries(index_q: Tensor, *, alone: bool) -> int:
    """Queries of one matrix product, for `index_q` [T, J, I]: as many as its columns hold, or, for queries that have no
    neighbours, as few as a product can have."""
    many = SCORE_COLUMNS if index_q.dtype.itemsize == 2 else SCORE_COLUMNS // 2
    return max(1, (FEWEST_COLUMNS if alone else many) // triton.next_power_of_2(index_q.shape[1]))


def select_rows(index_q: Tensor, gate: Tensor, batch: Batch, keys: Operand, topk: int) -> Tensor:
    """The sets of every query of a batch, int32 [B, topk]: ascending positions, then -1.

    `index_q` [T, J, I], `gate` float32 [T, J], both contiguous; the batch says which of their rows are meant.
    """
    need, B, device = Room.of(batch.length, topk), batch.queries, index_q.device
    heads, dim = index_q.shape[1:]
    padded_heads = max(triton.next_power_of_2(heads), FEWEST_COLUMNS // batch.block)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    scores, peaks = integers(B, need.width), integers(B, need.width // GROUP)
    kind, row, head, group = keys.constants
    grid = (B // batch.block, triton.cdiv(batch.length, SCORE_CHUNK))
    tile = SCORE_TILE if index_q.dtype.itemsize == 2 else SCORE_TILE // 2
    _tuned_scores[grid](
        index_q, gate, batch.rows, batch.last, batch.starts, batch.index_table, keys.values, keys.scales,
        scores, peaks, need.width, heads, BQ=batch.block, JP=padded_heads, D=dim, BK=tile, CHUNK=SCORE_CHUNK,
        GROUP=GROUP, KIND=kind, ROW=row, HEAD=head, SCALES=group, DOT=dot_dtype(index_q, keys.format),
        **launch_constants(),
    )  # fmt: skip
    return _topk(scores, peaks, batch, need)


def _topk(scores: Tensor, peaks: Tensor, batch: Batch, need: Room) -> Tensor:
    """Steps 2 to 4 of the module's docstring."""
    B, chunks = batch.queries, triton.cdiv(batch.length, CHUNK)
    floors, counts = scores.new_empty(B), scores.new_empty(B)
    above, equal = scores.new_empty(B, chunks), scores.new_empty(B, chunks)
    found, where = scores.new_empty(B, need.room), scores.new_empty(B, need.room)
    selected = scores.new_empty(B, need.topk)
    _floor_kernel[(B,)](peaks, batch.last, floors, need.width // GROUP, need.topk, TILE=TILE, GROUP=GROUP)
    _count_kernel[(B, chunks)](
        scores, batch.last, floors, above, equal, need.width, chunks, CHUNK=CHUNK, TILE=TILE
    )
    _collect_kernel[(B, chunks)](
        scores, batch.last, floors, above, equal, found, where, counts, need.width, need.room, chunks, need.topk,
        CHUNKS=triton.next_power_of_2(chunks), CHUNK=CHUNK, TILE=TILE,
    )  # fmt: skip
    _keep_kernel[(B,)](found, where, counts, selected, need.room, need.topk, TILE=TILE)
    return selected


def tally(selected: Tensor, counts: Tensor) -> None:
    """Adds one to `counts` (int64) at every position of `selected` (int32), without asking the card how many there
    are."""
    total = selected.numel()
    _tally_kernel[(triton.cdiv(total, TILE),)](selected, counts, total, TILE=TILE)

