"""Stored pasts of a request that had to make room: their bytes wait in a file without a name, and come back unchanged.

Computing them again would not give the same numbers: the shape of a matrix product decides its last bits, and sparse
selection can turn a last bit into another choice of keys. Knows blocks and bytes, not requests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keye.cache.mapped import DISK_RESERVE, scratch_tensor
from keye.cache.sequence import KVCache
from keye.cache.slabs import Block, KVStore
from keye.ops.kv_blocks import KV_BLOCK

if TYPE_CHECKING:
    from keye.cache.checksums import BlockCheck

#: The ledger's account: bytes on disk.
ACCOUNT = "kv-saved"


@dataclass(eq=False)
class SavedCaches:
    """What some sequences of one store held. `rows` uint8 [blocks, block_bytes] are the saved blocks, None for none;
    `tables` name the blocks of each sequence in order: the number of a saved one, or a block that stayed in memory.
    """

    store: KVStore
    rows: Tensor | None
    tables: list[list[int | Block]]
    lengths: list[int]
    checks: list[BlockCheck | None]

    @classmethod
    def save(cls, caches: Sequence[KVCache], folder: Path, stay: Collection[Block] = ()) -> SavedCaches:
        """Copies sequences to a new file in `folder`; the caches stay as they are. Blocks of `stay`, which other
        sequences hold anyway, are shared and not copied. `OutOfMemory` where the disk has no room."""
        store = caches[0].store
        assert store is not None
        staying, numbers, copied = {id(block) for block in stay}, dict[int, int](), list[Block]()
        tables: list[list[int | Block]] = []
        for cache in caches:
            table: list[int | Block] = []
            for block in cache.block_table[: -(-cache.length(0) // KV_BLOCK)]:
                if id(block) in staying:
                    table.append(block)
                    continue
                if id(block) not in numbers:
                    numbers[id(block)] = len(copied)
                    copied.append(block)
                table.append(numbers[id(block)])
            tables.append(table)
        rows = None
        if copied:
            shape = len(copied), store.layout.block_bytes
            # As much again is left free on the disk, but at most the usual reserve.
            rows = scratch_tensor(folder, shape, reserve=min(DISK_RESERVE, torch.Size(shape).numel()))
            store.ledger.reserve(ACCOUNT, rows.numel())
            for row, block in zip(rows, copied, strict=True):
                for part, stored in _parts(row, block):
                    part.copy_(stored)
        store.share([entry for table in tables for entry in table if isinstance(entry, Block)])
        return cls(store, rows, tables, [cache.length(0) for cache in caches], [cache.check for cache in caches])

    def restore(self) -> list[KVCache]:
        """The sequences, in memory again; this object is empty then. `OutOfMemory` where there is no room, and nothing
        changes."""
        blocks = self.store.take(0 if self.rows is None else self.rows.shape[0])
        if self.rows is not None:
            for row, block in zip(self.rows, blocks, strict=True):
                for part, stored in _parts(row, block):
                    stored.copy_(part)
        caches, used = [], set[int]()
        for table, length, check in zip(self.tables, self.lengths, self.checks, strict=True):
            own = [blocks[entry] if isinstance(entry, int) else entry for entry in table]
            # A saved block was taken for the first sequence that holds it; one that stayed has its reference already.
            again = [entry for entry in table if isinstance(entry, int) and entry in used]
            self.store.share([blocks[entry] for entry in again])
            used |= {entry for entry in table if isinstance(entry, int)}
            caches.append(KVCache.of_blocks(self.store, own, length, check))
        self.tables = []
        self.free()
        return caches

    def free(self) -> None:
        """Gives everything up; may be called twice."""
        if self.rows is not None:
            self.store.ledger.release(ACCOUNT, self.rows.numel())
            self.rows = None
        self.store.drop([entry for table in self.tables for entry in table if isinstance(entry, Block)])
        self.tables = []


def _parts(row: Tensor, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    """Each part of a saved row and the rows of the block that it holds, name by name, in the same shape."""
    start = 0
    for tensor in block.slab.rows.values():
        stored = tensor[:, block.slot]
        yield row[start : start + stored.numel()].view(stored.shape), stored
        start += stored.numel()
