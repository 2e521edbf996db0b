"""Which queries of a step go into one launch, and where the KV blocks of their sequences are.

A launch takes blocks of queries. The queries of a block belong to one sequence; blocks that a sequence does not fill
are padded with queries at position -1, which see nothing and whose outputs are not written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from keye.ops.backend import Stretch
from keye.ops.kv_blocks import KV_BLOCK
from keye.ops.triton.rows import INTERPRETED, Operand, operand

#: Sequences that bring at most this many queries are computed together in one launch, the keys of each split over
#: several programs.
FEW: Final = 8


@dataclass(frozen=True)
class Piece:
    """Queries begin .. stop of a stretch, counted from its first."""

    stretch: Stretch
    begin: int
    stop: int

    @property
    def length(self) -> int:
        """Keys that the last query sees."""
        return self.stretch.first + self.stop


@dataclass(frozen=True)
class Batch:
    """Queries of one launch, in blocks of `block`. int32 [B] each: `rows` of the step's tensors, `last` the position of
    each query (-1 for padding); `starts` int64 [B] where the blocks of its sequence begin in the tables (int32), which
    hold those of all sequences one after another. `length` is the most keys that a query sees."""

    block: int
    length: int
    rows: Tensor
    last: Tensor
    starts: Tensor
    k_table: Tensor
    v_table: Tensor
    indexer_table: Tensor

    @property
    def queries(self) -> int:
        """Queries with the padding."""
        return self.rows.shape[0]

    def parts(self, pieces: Sequence[Piece]) -> Iterator[slice]:
        """Where the queries of each of the pieces are."""
        begin = 0
        for piece in pieces:
            count = piece.stop - piece.begin
            yield slice(begin, begin + count)
            begin += -(-count // self.block) * self.block


def make_batch(pieces: Sequence[Piece], block: int, device: torch.device) -> Batch:
    """Lays out the queries of `pieces` in blocks; one copy to the device."""
    rows, last, starts, blocks = [], [], [], 0
    tables: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    for piece in pieces:
        count = piece.stop - piece.begin
        pad = -count % block
        offset = torch.arange(piece.begin, piece.stop)
        rows.append(torch.nn.functional.pad(offset + piece.stretch.start, (0, pad)))
        last.append(torch.nn.functional.pad(offset + piece.stretch.first, (0, pad), value=-1))
        starts.append(torch.full((count + pad,), blocks))
        needed = triton.cdiv(piece.length, KV_BLOCK)
        stored = piece.stretch.blocks
        assert stored is not None
        # The table of keys stands for that of indexer keys in models without an indexer.
        for table, part in zip(tables, (stored["k"], stored["v"], stored.get("indexer_k", stored["k"])), strict=True):
            assert part.table is not None and part.table.shape[0] >= needed, "a sequence has too few KV blocks"
            table.append(part.table[:needed].to(device))
        blocks += needed
    numbers = torch.stack((torch.cat(rows), torch.cat(last), torch.cat(starts))).to(torch.int32).to(device)
    length = max(piece.length for piece in pieces)
    return Batch(block, length, *numbers.unbind(0), *(torch.cat(table) for table in tables))


@dataclass(frozen=True)
class Pools:
    """What the sequences of a launch share: the memory of their KV blocks, by the names of rows."""

    k: Operand
    v: Operand
    indexer_k: Operand | None

    @staticmethod
    def of(stretch: Stretch) -> "Pools":
        """The pools that a stretch is in."""
        assert stretch.blocks is not None
        operands = {name: operand(rows) for name, rows in stretch.blocks.items()}
        return Pools(operands["k"], operands["v"], operands.get("indexer_k"))


def by_pools(stretches: Sequence[Stretch]) -> Iterator[tuple[Pools, list[Stretch]]]:
    """Stretches that are in the same pools and ask for the same exactness."""
    groups: dict[object, list[Stretch]] = {}
    for stretch in stretches:
        assert stretch.blocks is not None
        stored = stretch.blocks.values()
        where = [(rows.format, rows.pool.data_ptr()) for rows in stored if rows.pool is not None]
        groups.setdefault((*where, stretch.fixed), []).append(stretch)
    for group in groups.values():
        yield Pools.of(group[0]), group


def tuned(kernel: Any, key: list[str], options: Sequence[tuple[int, int]]) -> Any:
    """`kernel` with the fastest of a few numbers of warps and stages for each value of its arguments `key`, found when
    first called. Tile shapes are not varied: they may decide the last bits of a result."""
    if INTERPRETED:
        return kernel
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in options]
    return triton.autotune(configs=configs, key=key)(kernel)
