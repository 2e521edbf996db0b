"""Where keys, values and indexer keys of all sequences lie: slabs of blocks, a block being 64 tokens of every layer.

Keys, values and indexer keys are three tensors of a slab, so that each kind can lie elsewhere: `SlabMaker` decides.
Blocks are counted: sequences that share a prefix share its blocks. Every byte is in the ledger: those near the model in
the account `kv`, keys and values that lie elsewhere in `kv-host` or `kv-file`. Knows formats and bytes, not tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from keye.cache.ledger import SEPARATE_BUDGETS, Ledger
from keye.cache.mapped import scratch_tensor
from keye.config import TextConfig
from keye.errors import KeyeError
from keye.ops.kv_blocks import KV_BLOCK, RowFormat, RowKind

#: How keys and values are stored, as users say it; `auto` is the model's own number format.
KVFormat = Literal["auto", "bf16", "fp8", "int8", "int4"]
_KINDS: Final[dict[str, RowKind]] = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8", "int4": "int4"}
_OF_DTYPE: Final[dict[torch.dtype, RowKind]] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
}  # fmt: skip
#: Blocks that are taken from the system at once: 1,024 tokens.
SLAB_BLOCKS: Final = 16


@dataclass(frozen=True)
class KVLayout:
    """The formats of one run: rows of keys, of values and, in sparse models, of indexer keys, in each of `layers`."""

    layers: int
    keys: RowFormat
    values: RowFormat
    index: RowFormat | None

    @classmethod
    def of(cls, config: TextConfig, dtype: torch.dtype, kv: KVFormat = "auto", index: KVFormat = "auto") -> KVLayout:
        """The layout for a model whose activations are of `dtype`. `KeyeError` for formats that do not exist."""
        check_kv_format(kv)
        check_kv_format(index)
        own = _OF_DTYPE[dtype]
        rows = RowFormat(_KINDS.get(kv, own), config.num_key_value_heads, config.head_dim)
        sparse = config.sparse
        if index == "int4":
            raise KeyeError("indexer keys cannot be stored as int4; choose auto, bf16, fp8 or int8")
        keys = RowFormat(_KINDS.get(index, own), 1, sparse.indexer_head_dim) if sparse is not None else None
        return cls(config.num_hidden_layers, rows, rows, keys)

    @classmethod
    def like(cls, layers: int, k: Tensor, v: Tensor, indexer_k: Tensor | None) -> KVLayout:
        """The layout that holds such tensors as they are: `k`, `v` [n, G, D], `indexer_k` [n, I]."""
        index = None if indexer_k is None else RowFormat(_OF_DTYPE[indexer_k.dtype], 1, indexer_k.shape[1])
        return cls(layers, _format_of(k), _format_of(v), index)

    @property
    def formats(self) -> tuple[RowFormat, RowFormat, RowFormat | None]:
        """Of keys, values and indexer keys, in the order in which slabs hold them."""
        return self.keys, self.values, self.index

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * sum(f.row_bytes for f in self.formats if f is not None)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return KV_BLOCK * self.token_bytes

    @property
    def indexer_block_bytes(self) -> int:
        """Those of them that are indexer keys."""
        return 0 if self.index is None else self.layers * self.index.block_bytes


def _format_of(x: Tensor) -> RowFormat:
    return RowFormat(_OF_DTYPE[x.dtype], x.shape[1], x.shape[2])


def check_kv_format(kv: object) -> None:
    """`KeyeError` for anything but a `KVFormat`."""
    if kv not in get_args(KVFormat):
        raise KeyeError(f"the key-value format is {kv!r}; choose one of {', '.join(get_args(KVFormat))}")


#: Keys, values and indexer keys of a slab, uint8 [layers, blocks, 64, row_bytes] each; no indexer keys in dense models.
Kinds = tuple[Tensor, Tensor, Tensor | None]


@dataclass(eq=False)
class Slab:
    """Blocks taken together. `writable` is false for files that are only read, whose free blocks nobody gets again;
    `held` are its bytes in the ledger, by account; keys and values of a `mapped` one may still be on disk."""

    kinds: Kinds
    blocks: int
    held: Mapping[str, int]
    writable: bool = True
    mapped: bool = False
    free: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Block:
    """Block number `slot` of a slab, and how many sequences hold it."""

    slab: Slab
    slot: int
    references: int = 1


@dataclass(frozen=True)
class SlabMaker:
    """Makes the tensors of new slabs: `make(layout, blocks)`. `account` of the ledger pays for keys and values, which
    may be `mapped` from a file; indexer keys are always near and in `kv`."""

    make: Callable[[KVLayout, int], Kinds]
    account: str = "kv"
    mapped: bool = False


def memory_slabs(device: torch.device | str = "cpu") -> SlabMaker:
    """Slabs in the memory of a device. Main memory is taken page by page as it is written."""

    def make(layout: KVLayout, blocks: int) -> Kinds:
        return (
            _empty(layout, layout.keys, blocks, device),
            _empty(layout, layout.values, blocks, device),
            _near_index(layout, blocks, device),
        )

    return SlabMaker(make)


def host_slabs(device: torch.device | str) -> SlabMaker:
    """Keys and values in page-locked main memory beside a model on a GPU, indexer keys on the GPU. For a model in main
    memory this is `memory_slabs`."""
    if torch.device(device).type == "cpu":
        return memory_slabs()

    def make(layout: KVLayout, blocks: int) -> Kinds:
        return (
            _empty(layout, layout.keys, blocks, "cpu", pinned=True),
            _empty(layout, layout.values, blocks, "cpu", pinned=True),
            _near_index(layout, blocks, device),
        )

    return SlabMaker(make, "kv-host")


def file_slabs(folder: Path, device: torch.device | str = "cpu") -> SlabMaker:
    """Keys and values in mapped files of `folder` that have no name and vanish with the process, indexer keys near the
    model. The system keeps recently used pages in memory as far as there is room."""

    def make(layout: KVLayout, blocks: int) -> Kinds:
        rows = (layout.keys, layout.values)
        keys, values = (scratch_tensor(folder, (layout.layers, blocks, KV_BLOCK, one.row_bytes)) for one in rows)
        return keys, values, _near_index(layout, blocks, device)

    return SlabMaker(make, "kv-file", mapped=True)


def _empty(
    layout: KVLayout, rows: RowFormat, blocks: int, device: torch.device | str, *, pinned: bool = False
) -> Tensor:
    with torch.inference_mode(False):
        shape = (layout.layers, blocks, KV_BLOCK, rows.row_bytes)
        return torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pinned)


def _near_index(layout: KVLayout, blocks: int, device: torch.device | str) -> Tensor | None:
    return None if layout.index is None else _empty(layout, layout.index, blocks, device)


class KVStore:
    """Gives out blocks of one layout. Safe to use from several threads."""

    def __init__(
        self,
        layout: KVLayout,
        *,
        ledger: Ledger | None = None,
        make_slab: SlabMaker | None = None,
        slab_blocks: int = SLAB_BLOCKS,
    ) -> None:
        self.layout, self.ledger = layout, ledger or Ledger()
        self._make_slab, self._slab_blocks = make_slab or memory_slabs(), slab_blocks
        self._slabs: list[Slab] = []
        self._lock = self.ledger.lock

    def take(self, count: int) -> list[Block]:
        """`count` new blocks, or `OutOfMemory` and none."""
        with self._lock:
            taken: list[Block] = []
            try:
                while len(taken) < count:
                    slab = self._slab_with_room()
                    while slab.free and len(taken) < count:
                        taken.append(Block(slab, slab.free.pop()))
            except KeyeError:
                self.drop(taken)
                raise
            return taken

    def share(self, blocks: list[Block]) -> list[Block]:
        """The same blocks for one more holder."""
        with self._lock:
            for block in blocks:
                block.references += 1
        return list(blocks)

    def adopt(self, kinds: Kinds, blocks: int, near: int = 0) -> list[Block]:
        """All `blocks` of the tensors of a mapped file, such as an opened index: they are read only. `near` bytes of
        them are in the memory that the budget is about; `OutOfMemory` when it has no room for them."""
        self.ledger.reserve("kv", near)
        slab = Slab(kinds, blocks, {"kv": near}, writable=False, mapped=True)
        return [Block(slab, slot) for slot in range(blocks)]

    def drop(self, blocks: list[Block]) -> None:
        """One holder less of each; a block without holders is free, a slab of free blocks is given back."""
        with self._lock:
            for block in blocks:
                assert block.references > 0, "a block was dropped once too often"
                block.references -= 1
                if block.references == 0:
                    self._free(block)

    @property
    def accounts(self) -> Collection[str]:
        """The accounts of the ledger in which the bytes of slabs are."""
        return self._costs().keys()

    def room(self) -> int | None:
        """Tokens that can still be stored under the budgets; None without any."""
        with self._lock:
            ready = sum(len(slab.free) for slab in self._slabs)
            left = [(self.ledger.free(account), n) for account, n in self._costs().items() if n]
            slabs = [free // n for free, n in left if free is not None]
            return KV_BLOCK * (ready + max(0, min(slabs)) * self._slab_blocks) if slabs else None

    def shortage(self, tokens: int, scratch: int = 0) -> tuple[int, int, int] | None:
        """None if a new sequence of `tokens` has room when all others are gone, beside `scratch` bytes of memory; else
        the bytes that it takes of a budget, what that leaves for it, and the tokens that this is enough for."""
        slabs = self.slabs_for(tokens)
        for account, cost in self._costs().items():
            budget = self.ledger.limit(account)
            if budget is None or not cost:
                continue
            budget = max(0, budget - (0 if account in SEPARATE_BUDGETS else scratch))
            if slabs * cost > budget:
                return slabs * cost, budget, budget // cost * self._slab_blocks * KV_BLOCK
        return None

    @property
    def slab_bytes(self) -> int:
        """Bytes that are taken from the ledger at once."""
        return self._slab_blocks * self.layout.block_bytes

    def slabs_for(self, tokens: int) -> int:
        """Slabs that a new sequence of `tokens` takes."""
        return -(-tokens // (KV_BLOCK * self._slab_blocks))

    def nbytes(self) -> int:
        """Bytes of all slabs."""
        with self._lock:
            return sum(sum(slab.held.values()) for slab in self._slabs)

    def _costs(self) -> dict[str, int]:
        """Bytes of a new slab by the account that they are taken from."""
        near = self._slab_blocks * self.layout.indexer_block_bytes
        costs = {"kv": near}
        costs[self._make_slab.account] = costs.get(self._make_slab.account, 0) + self.slab_bytes - near
        return costs

    def _slab_with_room(self) -> Slab:
        """A slab with a free block, a new one if need be. Evicting a prefix may free blocks and no bytes."""
        while (slab := next((slab for slab in self._slabs if slab.free), None)) is None:
            short = [account for account, nbytes in self._costs().items() if not self.ledger.has_room(account, nbytes)]
            if not (short and self.ledger.reclaim(short[0])):
                return self._new_slab()
        return slab

    def _new_slab(self) -> Slab:
        held: dict[str, int] = {}
        try:
            for account, nbytes in self._costs().items():
                self.ledger.reserve(account, nbytes)
                held[account] = nbytes
            kinds = self._make_slab.make(self.layout, self._slab_blocks)
        except BaseException:
            self._release(held)
            raise
        free = list(reversed(range(self._slab_blocks)))
        slab = Slab(kinds, self._slab_blocks, held, mapped=self._make_slab.mapped, free=free)
        self._slabs.append(slab)
        return slab

    def _free(self, block: Block) -> None:
        slab = block.slab
        slab.free.append(block.slot)
        if len(slab.free) == slab.blocks:
            if slab.writable:
                self._slabs.remove(slab)
            self._release(slab.held)
        elif slab.writable:  # the lowest slot is given out first
            slab.free.sort(reverse=True)

    def _release(self, held: Mapping[str, int]) -> None:
        for account, nbytes in held.items():
            self.ledger.release(account, nbytes)
