"""The stored past of one sequence: a list of blocks in a store. Implements `keye.models.attention.SequenceCache`.

Legend: n tokens, G key/value heads, D head dim, I indexer dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch
from torch import Tensor

from keye.cache.checksums import PageCheck
from keye.cache.mapped import fetch_rows
from keye.cache.slabs import Block, KVLayout, KVStore, Slab, memory_slabs
from keye.errors import KeyeError
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat

#: What slabs hold, in this order.
KINDS: Final = ("keys", "values", "index")
_KEYS, _VALUES, _INDEX = 0, 1, 2


class KVCache:
    """Keys, values and indexer keys of every layer of one sequence.

    Without a store it makes its own in main memory or on the device of what is appended first, in the formats of that.
    `free` gives all blocks back; so does garbage collection.
    """

    def __init__(self, layers: int, store: KVStore | None = None) -> None:
        assert store is None or store.layout.layers == layers
        self.store = store
        self._lengths = [0] * layers
        self._blocks: list[Block] = []
        #: Where the pages of each kind, layer and block begin; int64 [3, layers, blocks and room to grow].
        self._addresses = torch.zeros(3, layers, 0, dtype=torch.int64)
        self._pages: dict[int, dict[str, BlockRows]] = {}
        self._places: _Places | None = None
        #: Compares the first blocks with their checksums, where they are those of a file.
        self.check: PageCheck | None = None

    def length(self, layer: int) -> int:
        """Tokens stored for `layer`."""
        return self._lengths[layer]

    @classmethod
    def of_blocks(cls, store: KVStore, blocks: list[Block], length: int, check: PageCheck | None = None) -> KVCache:
        """A sequence of `length` tokens that are in `blocks` already; `check` compares them with their checksums."""
        cache = cls(store.layout.layers, store)
        cache.check = check
        cache._extend(blocks)
        cache._lengths = [length] * store.layout.layers
        return cache

    @property
    def blocks(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    @property
    def block_table(self) -> Sequence[Block]:
        """The blocks in the order of their tokens; the last ones may be reserved and still empty."""
        return self._blocks

    def reserve(self, tokens: int) -> None:
        """Makes room for a length of `tokens` in all layers; `OutOfMemory` when there is none, and nothing changes."""
        assert self.store is not None
        if (more := -(-tokens // KV_BLOCK) - len(self._blocks)) > 0:
            self._extend(self.store.take(more))

    def append(self, layer: int, k: Tensor, v: Tensor, indexer_k: Tensor | None) -> None:
        """Adds n tokens: `k`, `v` [n, G, D]; `indexer_k` [n, I] or None."""
        if self.store is None:
            self.store = _own_store(len(self._lengths), k, v, indexer_k)
        start = self._lengths[layer]
        self.reserve(start + k.shape[0])
        layout = self.store.layout
        self._write(_KEYS, layer, start, layout.keys.encode(k.detach()))
        self._write(_VALUES, layer, start, layout.values.encode(v.detach()))
        if indexer_k is not None and layout.index is not None:
            self._write(_INDEX, layer, start, layout.index.encode(indexer_k.detach().unsqueeze(1)))
        self._lengths[layer] = start + k.shape[0]

    def indexer_keys(self, layer: int, start: int, stop: int) -> Tensor:
        """Indexer keys [stop - start, I] of these positions."""
        assert stop <= self._lengths[layer] and self.store is not None and self.store.layout.index is not None
        first, last = start // KV_BLOCK, -(-stop // KV_BLOCK)
        pages = [self._page(_INDEX, layer, block) for block in self._blocks[first:last]]
        rows = torch.cat(pages)[start - first * KV_BLOCK : stop - first * KV_BLOCK]
        return self.store.layout.index.decode(rows).squeeze(1)

    def rows(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, G, D] of `positions` (int64 [N])."""
        assert self.store is not None
        layout = self.store.layout
        keys = layout.keys.decode(self._gather(_KEYS, layer, positions, layout.keys))
        return keys, layout.values.decode(self._gather(_VALUES, layer, positions, layout.values))

    def layer_blocks(self, layer: int) -> Mapping[str, BlockRows] | None:
        """Where the KV blocks of a layer lie, by the names of rows. None before anything was stored."""
        if self.store is None:
            return None
        if layer not in self._pages:
            kinds = zip(("k", "v", "indexer_k"), enumerate(self.store.layout.formats), strict=True)
            self._pages[layer] = {n: self._paged(kind, layer, rows) for n, (kind, rows) in kinds if rows is not None}
        return self._pages[layer]

    def stored_pages(self, kind: int, layer: int) -> Iterator[Tensor]:
        """Encoded pages uint8 [64, row_bytes] of kind `KINDS[kind]`, in main memory. Rows after the last token, which
        nobody has written, are zeros."""
        for place, block in enumerate(self._blocks):
            page = self._page(kind, layer, block).cpu()
            if (rest := self._lengths[layer] - place * KV_BLOCK) < KV_BLOCK:
                page = page.clone()
                page[rest:] = 0
            yield page

    def wants_reads(self, layer: int) -> bool:
        """Whether `check_index` and `check_rows` have something to do."""
        return self.check is not None and not self.check.is_complete(layer)

    def check_index(self, layer: int) -> None:
        """All indexer keys of a layer are read."""
        if self.check is not None:
            self.check.compare("index", layer)

    def check_rows(self, layer: int, counts: Tensor | None) -> None:
        """Keys and values of a layer are read: those of positions whose `counts` (int64 [positions]) are not 0, or
        all."""
        if self.check is None:
            return
        blocks = None
        if counts is not None:
            whole = counts.shape[0] // KV_BLOCK
            blocks = counts[: whole * KV_BLOCK].view(whole, KV_BLOCK).amax(1).nonzero().squeeze(1).numpy()
        self.check.compare("keys", layer, blocks)
        self.check.compare("values", layer, blocks)

    @property
    def damage(self) -> KeyeError | None:
        """What is wrong with what was read: nothing that was computed from it may be used."""
        return None if self.check is None else self.check.damage

    def fork(self) -> KVCache:
        """A sequence that continues from the same tokens: full blocks are shared, the last one is copied."""
        copy = KVCache(len(self._lengths), self.store)
        copy.check = self.check
        if self.store is None:
            return copy
        full = min(self._lengths) // KV_BLOCK
        copy._extend(self.store.share(self._blocks[:full]))
        if rest := self._blocks[full : -(-max(self._lengths) // KV_BLOCK)]:
            copy._extend(self.store.take(len(rest)))
            for source, target in zip(rest, copy._blocks[full:], strict=True):
                _copy_block(source, target)
        copy._lengths = list(self._lengths)
        return copy

    def fork_prefix(self, length: int) -> KVCache:
        """A sequence that continues after the first `length` tokens, which all layers hold: full blocks are shared, a
        last one in part is copied."""
        assert self.store is not None and length <= min(self._lengths)
        copy = KVCache(len(self._lengths), self.store)
        full = length // KV_BLOCK
        copy._extend(self.store.share(self._blocks[:full]))
        if length % KV_BLOCK:
            copy._extend(self.store.take(1))
            _copy_block(self._blocks[full], copy._blocks[full])
        copy._lengths = [length] * len(self._lengths)
        return copy

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on, in all layers. The last block may be shared with nobody."""
        self._lengths = [min(length, n) for n in self._lengths]
        keep = -(-max(self._lengths) // KV_BLOCK)
        dropped, self._blocks = self._blocks[keep:], self._blocks[:keep]
        if dropped:
            self._changed()
            assert self.store is not None
            self.store.drop(dropped)

    def free(self) -> None:
        """Gives everything back; the cache is empty then and may be used again."""
        self.truncate(0)

    def __del__(self) -> None:
        if self._blocks:
            self.free()

    def nbytes(self) -> int:
        """Bytes of the blocks held; shared ones count in full."""
        return 0 if self.store is None else len(self._blocks) * self.store.layout.block_bytes

    def _extend(self, blocks: list[Block]) -> None:
        start, stop = len(self._blocks), len(self._blocks) + len(blocks)
        if stop > self._addresses.shape[2]:
            grown = self._addresses.new_zeros(*self._addresses.shape[:2], max(stop, 2 * start, 8))
            grown[:, :, :start] = self._addresses[:, :, :start]
            self._addresses = grown
        place = start
        for _, group in groupby(blocks, key=lambda block: id(block.slab)):
            run = list(group)
            self._addresses[:, :, place : place + len(run)] = _page_addresses(run, len(self._lengths))
            place += len(run)
        self._blocks += blocks
        self._changed()

    def _changed(self) -> None:
        """Forgets what was worked out about the blocks."""
        self._pages.clear()
        self._places = None

    def _paged(self, kind: int, layer: int, rows: RowFormat) -> BlockRows:
        tensors = {id(block.slab): self._kind(kind, block) for block in self._blocks}
        if all(tensor.device.type == "cpu" for tensor in tensors.values()):
            mapped = kind != _INDEX and any(block.slab.mapped for block in self._blocks)
            return BlockRows(rows, self._addresses[kind, layer, : len(self._blocks)], mapped=mapped)
        if len(tensors) != 1:
            return BlockRows(rows, None)
        (tensor,) = tensors.values()
        table = torch.tensor([block.slot for block in self._blocks], dtype=torch.int32, device=tensor.device)
        return BlockRows(rows, None, tensor[layer], table)

    @staticmethod
    def _kind(kind: int, block: Block) -> Tensor:
        tensor = block.slab.kinds[kind]
        assert tensor is not None
        return tensor

    def _page(self, kind: int, layer: int, block: Block) -> Tensor:
        return self._kind(kind, block)[layer, block.slot]

    def _write(self, kind: int, layer: int, start: int, rows: Tensor) -> None:
        """Puts encoded rows uint8 [n, row_bytes] at positions from `start` on."""
        width, done = rows.shape[1], 0
        while done < rows.shape[0]:
            place, offset = divmod(start + done, KV_BLOCK)
            count, block = min(KV_BLOCK - offset, rows.shape[0] - done), self._blocks[place]
            assert block.slab.writable and block.references == 1, "a shared block is written"
            target = int(self._addresses[kind, layer, place]) + offset * width
            if target > offset * width and rows.device.type == "cpu":  # a tenth of the time of a copy by torch
                ctypes.memmove(target, rows.data_ptr() + done * width, count * width)
            else:
                self._page(kind, layer, block)[offset : offset + count].copy_(rows[done : done + count])
            done += count

    def _gather(self, kind: int, layer: int, positions: Tensor, rows: RowFormat) -> Tensor:
        """Encoded rows uint8 [N, row_bytes] of positions, on their device."""
        if self._places is None or self._places.number.device != positions.device:
            self._places = _Places.of(self._blocks, positions.device)
        block, places = positions // KV_BLOCK, self._places
        slab_of, row_of = places.number[block], places.slot[block] * KV_BLOCK + positions % KV_BLOCK
        if len(places.slabs) == 1:
            return _rows_of(places.slabs[0], kind, layer, row_of).to(positions.device)
        out = torch.empty(positions.shape[0], rows.row_bytes, dtype=torch.uint8, device=positions.device)
        for number in slab_of.unique().tolist():
            mine = (slab_of == number).nonzero().squeeze(1)
            out[mine] = _rows_of(places.slabs[number], kind, layer, row_of[mine]).to(positions.device)
        return out


@dataclass(frozen=True)
class _Places:
    """Where the blocks of a sequence lie: `number` of the slab and `slot` in it, int64 [blocks] each."""

    slabs: tuple[Slab, ...]
    number: Tensor
    slot: Tensor

    @classmethod
    def of(cls, blocks: list[Block], device: torch.device) -> _Places:
        slabs = list({id(block.slab): block.slab for block in blocks}.values())
        numbers = {id(slab): i for i, slab in enumerate(slabs)}
        where = torch.tensor([(numbers[id(b.slab)], b.slot) for b in blocks], dtype=torch.int64, device=device)
        return cls(tuple(slabs), where[:, 0], where[:, 1])


def _rows_of(slab: Slab, kind: int, layer: int, rows: Tensor) -> Tensor:
    """Rows int64 [n] of a slab, its blocks counted through. Those of page-locked memory are gathered there, and move to
    the GPU in one copy."""
    tensor = slab.kinds[kind]
    assert tensor is not None
    flat, chosen = tensor[layer].flatten(0, 1), rows.to(tensor.device)
    if slab.mapped and tensor.device.type == "cpu":
        fetch_rows(flat, chosen)
    if not (tensor.device.type == "cpu" and rows.device.type == "cuda"):
        return flat[chosen]
    out = torch.empty(chosen.shape[0], flat.shape[1], dtype=torch.uint8, pin_memory=True)
    return torch.index_select(flat, 0, chosen, out=out)


def _own_store(layers: int, k: Tensor, v: Tensor, indexer_k: Tensor | None) -> KVStore:
    return KVStore(KVLayout.like(layers, k, v, indexer_k), make_slab=memory_slabs(k.device))


def _page_addresses(blocks: list[Block], layers: int) -> Tensor:
    """Addresses of the pages of blocks of one slab, int64 [3, layers, blocks]; 0 where they lie in another memory."""
    out = torch.zeros(3, layers, len(blocks), dtype=torch.int64)
    slots, layer = torch.tensor([block.slot for block in blocks]), torch.arange(layers).unsqueeze(1)
    for kind, tensor in enumerate(blocks[0].slab.kinds):
        if tensor is not None and tensor.device.type == "cpu":
            layer_step, slot_step = tensor.stride()[:2]
            out[kind] = tensor.data_ptr() + layer * layer_step + slots * slot_step
    return out


def _copy_block(source: Block, target: Block) -> None:
    for old, new in zip(source.slab.kinds, target.slab.kinds, strict=True):
        if old is not None and new is not None:
            new[:, target.slot].copy_(old[:, source.slot])
