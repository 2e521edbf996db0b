"""Where the cached rows of all sequences are stored: slabs of blocks, a block being 64 tokens of every layer.

The rows of each name are a tensor of a slab, so that they can be stored in different memories: `SlabMaker` decides.
Blocks are counted: sequences that share a prefix share its blocks. Every byte is in the ledger: those near the model in
the account `kv`, rows stored elsewhere in `kv-host` or `kv-file`. `KVOptions` is what a user chooses of it: number
formats, and in which memory rows are. Knows formats and bytes, not tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from keye.cache.ledger import SEPARATE_BUDGETS, Ledger, OutOfMemory
from keye.cache.mapped import scratch_tensor
from keye.errors import KeyeError, Option
from keye.ops.kv_blocks import KV_BLOCK, RowFormat, RowKind, RowSpec
from keye.process import memory_on
from keye.weights.source import ask_for_huge_pages

#: How cached rows are stored, as users say it; `auto` is the model's own number format.
KVFormat = Literal["auto", "bf16", "fp8", "int8", "int4"]
_KINDS: Final[dict[str, RowKind]] = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8", "int4": "int4"}
_OF_DTYPE: Final[dict[torch.dtype, RowKind]] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
}  # fmt: skip
#: Blocks that are allocated at once: 1,024 tokens.
SLAB_BLOCKS: Final = 16


@dataclass(frozen=True)
class KVLayout:
    """How one run stores the cached rows of its model: the format of the rows of each name in each of `layers`. Rows
    named in `scanned` are read in full at every step and stay near the model."""

    layers: int
    rows: Mapping[str, RowFormat]
    scanned: Collection[str] = ()

    @classmethod
    def of(
        cls, specs: Mapping[str, RowSpec], dtype: torch.dtype, kv: KVFormat = "auto", indexer: KVFormat = "auto"
    ) -> KVLayout:
        """The layout for the rows that a model declares, `auto` being `dtype`, that of its activations; `indexer` is
        for scanned rows. `KeyeError` for formats that do not exist."""
        check_kv_format(kv)
        check_kv_format(indexer)
        if indexer == "int4":
            raise KeyeError("indexer keys cannot be stored as int4; choose auto, bf16, fp8 or int8")
        own, (layers,) = _OF_DTYPE[dtype], {spec.layers for spec in specs.values()}
        rows = {
            name: RowFormat(_KINDS.get(indexer if spec.scanned else kv, own), spec.heads, spec.dim)
            for name, spec in specs.items()
        }
        return cls(layers, rows, tuple(name for name, spec in specs.items() if spec.scanned))

    @classmethod
    def like(cls, layers: int, rows: Mapping[str, Tensor]) -> KVLayout:
        """The layout that holds such tensors [n, heads, dim] as they are."""
        return cls(layers, {name: RowFormat(_OF_DTYPE[x.dtype], *x.shape[1:]) for name, x in rows.items()})

    @property
    def kind(self) -> RowKind:
        """The number format of the rows that are not scanned."""
        return next(rows.kind for name, rows in self.rows.items() if name not in self.scanned)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * sum(rows.row_bytes for rows in self.rows.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return KV_BLOCK * self.token_bytes

    @property
    def scanned_block_bytes(self) -> int:
        """Those of them that are scanned rows."""
        return self.layers * sum(self.rows[name].block_bytes for name in self.scanned)


def check_kv_format(kv: object) -> None:
    """`KeyeError` for anything but a `KVFormat`."""
    if kv not in get_args(KVFormat):
        raise KeyeError(f"the key-value format is {kv!r}; choose one of {', '.join(get_args(KVFormat))}")


#: The rows of a slab by name, uint8 [layers, blocks, 64, row_bytes] each.
SlabRows = Mapping[str, Tensor]


@dataclass(eq=False)
class Slab:
    """Blocks reserved together. `writable` is false for files that are only read, whose free blocks are not used again;
    `reserved` are its bytes in the ledger, by account; rows of a `mapped` one may still be on disk, unless they are
    scanned."""

    rows: SlabRows
    blocks: int
    reserved: Mapping[str, int]
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
    """Makes the tensors of new slabs: `make(shape)` one for rows that are not scanned, which `account` of the ledger
    pays for and which may be `mapped` from a file. Scanned rows are always on `device` and in `kv`."""

    make: Callable[[Sequence[int]], Tensor]
    device: torch.device | str
    account: str = "kv"
    mapped: bool = False


def memory_slabs(device: torch.device | str = "cpu", *, pinned: bool = False) -> SlabMaker:
    """Slabs in the memory of a device. Main memory is taken as it is written, in huge pages where there are any: single
    rows are read from all over it, and finding their pages takes longer than reading them."""

    def make(shape: Sequence[int]) -> Tensor:
        with torch.inference_mode(False):
            slab = torch.empty(tuple(shape), dtype=torch.uint8, device=device, pin_memory=pinned)
        ask_for_huge_pages(slab)
        return slab

    return SlabMaker(make, device)


def file_slabs(folder: Path, device: torch.device | str = "cpu") -> SlabMaker:
    """Rows in mapped files of `folder` that have no name and vanish with the process, scanned ones near the model. The
    system keeps recently used memory pages of them as far as there is room."""
    return SlabMaker(partial(scratch_tensor, folder), device, "kv-file", mapped=True)


class KVStore:
    """Gives out blocks of one layout. Safe to use from several threads."""

    def __init__(
        self, layout: KVLayout, *, ledger: Ledger | None = None, make_slab: SlabMaker | None = None,
        slab_blocks: int = SLAB_BLOCKS,
    ) -> None:  # fmt: skip
        self.layout, self.ledger = layout, ledger or Ledger()
        self._make_slab, self._slab_blocks = make_slab or memory_slabs(), slab_blocks
        self._slabs: list[Slab] = []
        self._lock = self.ledger.lock

    def take(self, count: int) -> list[Block]:
        """`count` new blocks, or `OutOfMemory` and none."""
        with self._lock:
            blocks: list[Block] = []
            try:
                while len(blocks) < count:
                    slab = self._slab_with_room()
                    while slab.free and len(blocks) < count:
                        blocks.append(Block(slab, slab.free.pop()))
            except KeyeError:
                self.drop(blocks)
                raise
            return blocks

    def share(self, blocks: list[Block]) -> list[Block]:
        """The same blocks for one more holder."""
        with self._lock:
            for block in blocks:
                block.references += 1
        return list(blocks)

    def adopt(self, rows: SlabRows, blocks: int, near: int = 0) -> list[Block]:
        """All `blocks` of the tensors of a mapped file, such as an opened index: they are read only. `near` bytes of
        them are in the memory that the budget is about; `OutOfMemory` when it has no room for them."""
        self.ledger.reserve("kv", near)
        slab = Slab(rows, blocks, {"kv": near}, writable=False, mapped=True)
        return [Block(slab, slot) for slot in range(blocks)]

    def drop(self, blocks: list[Block]) -> None:
        """One holder less of each; a block without holders is free, a slab of free blocks is released."""
        with self._lock:
            for block in blocks:
                assert block.references > 0, "a block was dropped once too often"
                block.references -= 1
                slab = block.slab
                if block.references:
                    continue
                slab.free.append(block.slot)
                if len(slab.free) == slab.blocks:
                    if slab.writable:
                        self._slabs.remove(slab)
                    self._release(slab.reserved)
                elif slab.writable:  # the lowest slot is given out first
                    slab.free.sort(reverse=True)

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
        """Bytes that are reserved at once."""
        return self._slab_blocks * self.layout.block_bytes

    def slabs_for(self, tokens: int) -> int:
        """Slabs that a new sequence of `tokens` takes."""
        return -(-tokens // (KV_BLOCK * self._slab_blocks))

    def nbytes(self) -> int:
        """Bytes of all slabs."""
        with self._lock:
            return sum(sum(slab.reserved.values()) for slab in self._slabs)

    def _costs(self) -> dict[str, int]:
        """Bytes of a new slab by the account that they are reserved in."""
        near = self._slab_blocks * self.layout.scanned_block_bytes
        costs = {"kv": near}
        costs[self._make_slab.account] = costs.get(self._make_slab.account, 0) + self.slab_bytes - near
        return costs

    def _slab_with_room(self) -> Slab:
        """A slab with a free block, a new one if need be. Evicting a prefix may free blocks and no bytes."""
        while (slab := next((slab for slab in self._slabs if slab.free), None)) is None:
            short = [account for account, nbytes in self._costs().items() if not self.ledger.has_room(account, nbytes)]
            if short and self.ledger.reclaim(short[0]):
                continue
            try:
                return self._new_slab()
            except OutOfMemory:
                # Without bytes missing in a budget, the disk of a mapped file is full: its slabs may become free.
                if short or not self.ledger.reclaim(self._make_slab.account):
                    raise
        return slab

    def _new_slab(self) -> Slab:
        reserved: dict[str, int] = {}
        try:
            for account, nbytes in self._costs().items():
                self.ledger.reserve(account, nbytes)
                reserved[account] = nbytes
            near, maker, layout = memory_slabs(self._make_slab.device).make, self._make_slab.make, self.layout
            shape = layout.layers, self._slab_blocks, KV_BLOCK
            rows = {
                name: (near if name in layout.scanned else maker)((*shape, form.row_bytes))
                for name, form in layout.rows.items()
            }
        except BaseException:
            self._release(reserved)
            raise
        free = list(reversed(range(self._slab_blocks)))
        slab = Slab(rows, self._slab_blocks, reserved, mapped=self._make_slab.mapped, free=free)
        self._slabs.append(slab)
        return slab

    def _release(self, reserved: Mapping[str, int]) -> None:
        for account, nbytes in reserved.items():
            self.ledger.release(account, nbytes)


#: Where keys and values lie: in the memory of the model's device, in main memory, or in a mapped file.
Tier = Literal["memory", "host", "file"]
#: Share of the free memory that may be taken where nothing else is said.
FREE_SHARE: Final = 0.85
#: Blocks of a slab in a file: 4,096 tokens, so that the longest context needs few files.
FILE_BLOCKS: Final = 64


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a model on `device` may take by default: a share of what is free now. None where that is not known."""
    memory = memory_on(str(device))
    return None if memory is None else int(FREE_SHARE * memory.free)


@dataclass(frozen=True)
class KVOptions:
    """`kv` is the format of keys and values, `indexer_kv` that of indexer keys. `folder` is that of the file tier, the
    system's folder for temporary files by default. `memory` bytes may be taken for keys, values and visual tokens, None
    for no limit. KeyeError names a field out of range."""

    kv: KVFormat = "auto"
    indexer_kv: KVFormat = "auto"
    tier: Tier = "memory"
    folder: Path | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        check_kv_format(self.kv)
        check_kv_format(self.indexer_kv)
        if self.tier not in get_args(Tier):
            raise KeyeError("{} is {!r}; choose one of {}", Option("kv_tier"), self.tier, ", ".join(get_args(Tier)))
        if self.folder is not None and self.tier != "file":
            raise KeyeError("{} has no effect without {}", Option("kv_folder"), Option("kv_tier", "file"))

    def layout(self, specs: Mapping[str, RowSpec], dtype: torch.dtype) -> KVLayout:
        """The formats of the rows that a model with activations of `dtype` declares."""
        return KVLayout.of(specs, dtype, self.kv, self.indexer_kv)

    def store(self, layout: KVLayout, device: torch.device | str, ledger: Ledger | None = None) -> KVStore:
        """A store in this tier for a model on `device`."""
        blocks = FILE_BLOCKS if self.tier == "file" else SLAB_BLOCKS
        make = memory_slabs(device)
        if self.tier == "file":
            make = file_slabs(self.folder or Path(tempfile.gettempdir()), device)
        elif self.tier == "host" and torch.device(device).type != "cpu":  # rows in page-locked memory, scanned ones not
            make = SlabMaker(memory_slabs("cpu", pinned=True).make, device, "kv-host")
        return KVStore(layout, ledger=ledger, make_slab=make, slab_blocks=blocks)
