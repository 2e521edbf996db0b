"""The stored past of one sequence: a list of blocks in a store. Implements `keye.models.attention.SequenceCache`.

Rows have the names that the model declares (`models.attention.cache_rows`): `k`, `v`, `indexer_k`, or others.

Legend: n tokens, N rows, H heads of a row, D numbers of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from keye.cache.slabs import Block, KVLayout, KVStore, Slab, memory_slabs
from keye.errors import KeyeError
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat
from keye.ops.mapped import fetch_rows
from keye.ops.registry import encode_rows

if TYPE_CHECKING:
    from keye.cache.checksums import BlockCheck


class KVCache:
    """The cached rows of every layer of one sequence.

    Without a store it makes its own in main memory or on the device of what is appended first, in the formats of that.
    `free` returns all blocks to the store; so does garbage collection.
    """

    def __init__(self, layers: int, store: KVStore | None = None) -> None:
        assert store is None or store.layout.layers == layers
        self.store = store
        self._lengths = [0] * layers
        self._table = BlockTable()
        self._layer_blocks: dict[int, dict[str, BlockRows]] = {}
        #: Compares the first blocks with their checksums, where they are those of a file.
        self.check: BlockCheck | None = None

    @classmethod
    def of_blocks(cls, store: KVStore, blocks: list[Block], length: int, check: BlockCheck | None = None) -> KVCache:
        """A sequence of `length` tokens that are in `blocks` already; `check` compares them with their checksums."""
        cache = cls(store.layout.layers, store)
        cache.check = check
        cache._extend(blocks)
        cache._lengths = [length] * store.layout.layers
        return cache

    def length(self, layer: int) -> int:
        """Tokens stored for `layer`."""
        return self._lengths[layer]

    @property
    def blocks(self) -> int:
        """Blocks held."""
        return len(self._table.blocks)

    @property
    def block_table(self) -> Sequence[Block]:
        """The blocks in the order of their tokens; the last ones may be reserved and still empty."""
        return self._table.blocks

    @property
    def formats(self) -> Mapping[str, RowFormat] | None:
        """How rows are stored, by name; None before anything was appended to a cache without a store."""
        return None if self.store is None else self.store.layout.rows

    @property
    def damage(self) -> KeyeError | None:
        """What is wrong with what was read: nothing that was computed from it may be used."""
        return None if self.check is None else self.check.damage

    def reserve(self, tokens: int) -> int:
        """Makes room for a length of `tokens` in all layers and returns the blocks held then; `OutOfMemory` when there
        is none, and nothing changes."""
        assert self.store is not None
        if (more := -(-tokens // KV_BLOCK) - self.blocks) > 0:
            self._extend(self.store.take(more))
        return self.blocks

    def append(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """Adds n tokens: rows [n, H, D] by name. Names that the store does not have are left out, and those that are
        missing here (an indexer's keys under dense attention) are not written."""
        if self.store is None:
            device = next(iter(rows.values())).device
            self.store = KVStore(KVLayout.like(len(self._lengths), rows), make_slab=memory_slabs(device))
        formats = self.store.layout.rows
        self.append_encoded(
            layer, {name: encode_rows(form, rows[name].detach()) for name, form in formats.items() if name in rows}
        )

    def append_encoded(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """`append` of rows that are encoded in the formats of the store, uint8 [n, row_bytes]."""
        start = self._lengths[layer]
        stop = start + next(iter(rows.values())).shape[0]
        self.reserve(stop)
        for name, encoded in rows.items():
            self._table.write(name, layer, start, encoded)
        self._lengths[layer] = stop

    def read(self, layer: int, name: str, positions: Tensor) -> Tensor:
        """The rows [N, H, D] of a name at `positions` (int64 [N])."""
        return self._format(name).decode(self._table.gather(name, layer, positions))

    def read_range(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        """The rows [stop - start, H, D] of a name at positions start .. stop; scanned ones that are stored as int8 are
        exact, in float32."""
        assert stop <= self._lengths[layer]
        first, last = start // KV_BLOCK, -(-stop // KV_BLOCK)
        rows = torch.cat([block.slab.rows[name][layer, block.slot] for block in self.block_table[first:last]])
        assert self.store is not None
        exact = torch.float32 if name in self.store.layout.scanned and self._format(name).kind == "int8" else None
        return self._format(name).decode(rows[start - first * KV_BLOCK : stop - first * KV_BLOCK], exact)

    def layer_blocks(self, layer: int) -> Mapping[str, BlockRows] | None:
        """Where the KV blocks of a layer are, by the names of rows. None before anything was stored."""
        if self.store is None:
            return None
        if layer not in self._layer_blocks:
            layout = self.store.layout
            self._layer_blocks[layer] = {
                name: self._table.block_rows(name, layer, form, scanned=name in layout.scanned)
                for name, form in layout.rows.items()
            }
        return self._layer_blocks[layer]

    def fork(self, length: int | None = None) -> KVCache:
        """A sequence that continues from the same tokens, or after the first `length`, which all layers hold: full
        blocks are shared, the last one is copied."""
        copy = KVCache(len(self._lengths), self.store)
        copy.check = self.check
        if self.store is None:
            return copy
        lengths = self._lengths if length is None else [length] * len(self._lengths)
        assert length is None or length <= min(self._lengths)
        full = min(lengths) // KV_BLOCK
        copy._extend(self.store.share(self._table.blocks[:full]))
        if rest := self._table.blocks[full : -(-max(lengths) // KV_BLOCK)]:
            copy._extend(self.store.take(len(rest)))
            for source, target in zip(rest, copy._table.blocks[full:], strict=True):
                for name, rows in source.slab.rows.items():
                    target.slab.rows[name][:, target.slot].copy_(rows[:, source.slot])
        copy._lengths = list(lengths)
        return copy

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on, in all layers. The last block must not be shared."""
        self._lengths = [min(length, n) for n in self._lengths]
        if dropped := self._table.truncate(-(-max(self._lengths) // KV_BLOCK)):
            self._layer_blocks.clear()
            assert self.store is not None
            self.store.drop(dropped)

    def free(self) -> None:
        """Releases everything; the cache is empty then and may be used again."""
        self.truncate(0)

    def __del__(self) -> None:
        if self.blocks:
            self.free()

    def _format(self, name: str) -> RowFormat:
        assert self.store is not None
        return self.store.layout.rows[name]

    def _extend(self, blocks: list[Block]) -> None:
        self._table.extend(blocks)
        self._layer_blocks.clear()


class BlockTable:
    """The blocks of one sequence in the order of its tokens, and encoded rows in them."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        #: Where the KV blocks of each name and layer begin; int64 [layers, blocks and room to grow].
        self._addresses: dict[str, Tensor] = {}
        #: The slabs of the blocks, the number of the slab of each block and its slot in it, int64 [blocks] each.
        self._places: tuple[list[Slab], Tensor, Tensor] | None = None

    def extend(self, blocks: list[Block]) -> None:
        """Adds blocks of one layout at the end."""
        start, stop = len(self.blocks), len(self.blocks) + len(blocks)
        for name, rows in blocks[0].slab.rows.items() if blocks else ():
            addresses = self._addresses.get(name, torch.zeros(rows.shape[0], 0, dtype=torch.int64))
            if stop > addresses.shape[1]:
                self._addresses[name] = addresses = pad(addresses[:, :start], (0, max(stop, 2 * start, 8) - start))
            place = start
            for _, group in groupby(blocks, key=lambda block: id(block.slab)):
                run = list(group)
                tensor, part = run[0].slab.rows[name], addresses[:, place : place + len(run)]
                if tensor.device.type == "cpu":
                    slots = torch.tensor([block.slot for block in run]) * tensor.stride(1)
                    layers = torch.arange(tensor.shape[0]).unsqueeze(1) * tensor.stride(0)
                    part[:] = tensor.data_ptr() + layers + slots
                else:
                    part.zero_()
                place += len(run)
        self.blocks += blocks
        self._places = None

    def truncate(self, count: int) -> list[Block]:
        """Leaves `count` blocks; returns those after them."""
        dropped, self.blocks = self.blocks[count:], self.blocks[:count]
        self._places = None
        return dropped

    def block_rows(self, name: str, layer: int, form: RowFormat, *, scanned: bool) -> BlockRows:
        """Where the rows of a name and layer are, for the kernels."""
        tensors = {id(block.slab): block.slab.rows[name] for block in self.blocks}
        if all(tensor.device.type == "cpu" for tensor in tensors.values()):
            mapped = not scanned and any(block.slab.mapped for block in self.blocks)
            return BlockRows(form, self._addresses[name][layer, : len(self.blocks)], mapped=mapped)
        if len(tensors) != 1:
            return BlockRows(form, None)
        (tensor,) = tensors.values()
        table = torch.tensor([block.slot for block in self.blocks], dtype=torch.int32, device=tensor.device)
        return BlockRows(form, None, tensor[layer], table)

    def write(self, name: str, layer: int, start: int, rows: Tensor) -> None:
        """Puts encoded rows uint8 [n, row_bytes] at positions from `start` on."""
        width, done = rows.shape[1], 0
        while done < rows.shape[0]:
            place, offset = divmod(start + done, KV_BLOCK)
            count, block = min(KV_BLOCK - offset, rows.shape[0] - done), self.blocks[place]
            assert block.slab.writable and block.references == 1, "a shared block is written"
            target = int(self._addresses[name][layer, place]) + offset * width
            if target > offset * width and rows.device.type == "cpu":  # a tenth of the time of a copy by torch
                ctypes.memmove(target, rows.data_ptr() + done * width, count * width)
            else:
                block.slab.rows[name][layer, block.slot, offset : offset + count].copy_(rows[done : done + count])
            done += count

    def gather(self, name: str, layer: int, positions: Tensor) -> Tensor:
        """Encoded rows uint8 [N, row_bytes] of positions, on their device."""
        if self._places is None or self._places[1].device != positions.device:
            slabs = list({id(block.slab): block.slab for block in self.blocks}.values())
            numbers = {id(slab): number for number, slab in enumerate(slabs)}
            places = [(numbers[id(block.slab)], block.slot) for block in self.blocks]
            number, slot = torch.tensor(places, dtype=torch.int64, device=positions.device).unbind(1)
            self._places = slabs, number, slot
        block, (slabs, number, slot) = positions // KV_BLOCK, self._places
        slab_of, row_of = number[block], slot[block] * KV_BLOCK + positions % KV_BLOCK
        if len(slabs) == 1:
            return _rows_of(slabs[0], name, layer, row_of).to(positions.device)
        size = (positions.shape[0], slabs[0].rows[name].shape[-1])
        out = torch.empty(size, dtype=torch.uint8, device=positions.device)
        for index in slab_of.unique().tolist():
            mine = (slab_of == index).nonzero().squeeze(1)
            out[mine] = _rows_of(slabs[index], name, layer, row_of[mine]).to(positions.device)
        return out


def _rows_of(slab: Slab, name: str, layer: int, rows: Tensor) -> Tensor:
    """Rows int64 [n] of a slab, its blocks counted through. Those of page-locked memory are gathered there, and move to
    the GPU in one copy."""
    tensor = slab.rows[name]
    flat, chosen = tensor[layer].flatten(0, 1), rows.to(tensor.device)
    if slab.mapped and tensor.device.type == "cpu":
        fetch_rows(flat, chosen)
    if not (tensor.device.type == "cpu" and rows.device.type == "cuda"):
        return flat[chosen]
    out = torch.empty(chosen.shape[0], flat.shape[1], dtype=torch.uint8, pin_memory=True)
    return torch.index_select(flat, 0, chosen, out=out)
