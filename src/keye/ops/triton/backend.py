"""`TritonBackend`: the attention of a step by Triton kernels over one pool of KV blocks for each name of rows.

Computes stretches of few queries (decoding) in one launch, whatever their number, and longer ones in slices whose
scratch memory fits a budget. Knows which stretches it can take; does not know how kernels work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from keye.ops.backend import Kernel, Selected, SelectionByStretch, Stretch
from keye.ops.triton import attention, selection, serves
from keye.ops.triton.layout import FEW, Batch, Piece, Pools, by_pools, make_batch
from keye.ops.triton.rows import readable

_MASK_BYTES = selection.SCRATCH_BYTES


class TritonBackend(SelectionByStretch):
    """Implements `keye.ops.backend.Backend` for inference on GPUs of compute capability 8.0 and newer, and, in
    Triton's interpreter, on tensors of the processor.

    Results of a `fixed` stretch come from tiles of one shape and are not split. Others depend, in their last bits, on
    whether a stretch brings few queries, never on the other stretches.
    """

    name = "triton"

    def takes(self, q: Tensor, stretch: Stretch) -> bool:
        blocks = stretch.blocks
        if blocks is None or not serves(q) or (q.requires_grad and torch.is_grad_enabled()):
            return False
        if not {"k", "v"} <= set(blocks) or not all(readable(rows, q.device) for rows in blocks.values()):
            return False
        if q.shape[2] != blocks["k"].format.dim or q.shape[2] != blocks["v"].format.dim:
            return False
        indexer_k = blocks.get("indexer_k")
        return indexer_k is None or (indexer_k.format.heads == 1 and not indexer_k.format.rotated)

    def dense(self, q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        q = q.contiguous()
        for pools, group in by_pools(stretches):
            fixed, few, many = _sorted(group)
            queries, output = attention.rotate_queries(q, out, pools)
            ratio = q.shape[1] // pools.k.format.heads
            block = attention.block_queries(ratio, q.dtype, alone=not fixed)
            for pieces in _packed(few, lambda length: attention.most_queries(length, q)):
                batch = make_batch(pieces, block, q.device)
                attention.attend_tiles(queries, batch, pools, output, split=not fixed)
            if many:
                block = attention.block_queries(ratio, q.dtype, alone=False)
                batch = make_batch([_all_queries(stretch) for stretch in many], block, q.device)
                attention.attend_tiles(queries, batch, pools, output, split=False)
            attention.rotate_outputs(output, out, group)

    def select(self, indexer_q: Tensor, gate: Tensor, stretch: Stretch, topk: int) -> Iterator[tuple[int, Tensor]]:
        indexer_q, gate, pools = indexer_q.contiguous(), gate.float().contiguous(), Pools.of(stretch)
        for piece in _slices(stretch, topk, selection.block_queries(indexer_q, alone=False)):
            _, selected = _select(indexer_q, gate, [piece], pools, topk, alone=False)
            yield piece.begin, selected[: piece.stop - piece.begin].long()

    def attend(self, q: Tensor, selected: Selected, stretch: Stretch, out: Tensor, kernel: Kernel = "auto") -> None:
        pools = Pools.of(stretch)
        queries, output = attention.rotate_queries(q.contiguous(), out, pools)
        for offset, positions in selected:
            chosen = positions.to(q.device, torch.int32).contiguous()
            piece = Piece(stretch, offset, offset + chosen.shape[0])
            if kernel == "masked":
                _attend_masked(queries, chosen, piece, pools, output)
            else:
                batch = make_batch([piece], 1, q.device)
                split = not stretch.fixed and stretch.stop - stretch.start <= FEW
                attention.attend_selected(queries, chosen, batch, pools, output, split=split)
            _count(chosen, stretch.counts)
        attention.rotate_outputs(output, out, [stretch])

    def sparse(
        self, q: Tensor, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
    ) -> None:
        q, indexer_q, gate = q.contiguous(), indexer_q.contiguous(), gate.float().contiguous()
        for pools, group in by_pools(stretches):
            fixed, few, many = _sorted(group)
            queries, output = attention.rotate_queries(q, out, pools)
            packed = _packed(few, lambda length: selection.most_queries(length, topk))
            launches = [(pieces, not fixed) for pieces in packed]
            block = selection.block_queries(indexer_q, alone=False)
            launches += [([piece], False) for stretch in many for piece in _slices(stretch, topk, block)]
            for pieces, alone in launches:
                batch, selected = _select(indexer_q, gate, pieces, pools, topk, alone=alone)
                attention.attend_selected(queries, selected, batch, pools, output, split=alone)
                for piece, part in zip(pieces, batch.parts(pieces), strict=True):
                    _count(selected[part], piece.stretch.counts)
            attention.rotate_outputs(output, out, group)


def _sorted(group: Sequence[Stretch]) -> tuple[bool, list[Stretch], list[Stretch]]:
    """Whether a group is `fixed` (all of it is, or none), its stretches of few queries, and the others."""
    few = [stretch for stretch in group if stretch.stop - stretch.start <= FEW]
    return group[0].fixed, few, [stretch for stretch in group if stretch.stop - stretch.start > FEW]


def _all_queries(stretch: Stretch) -> Piece:
    return Piece(stretch, 0, stretch.stop - stretch.start)


def _packed(few: Sequence[Stretch], most_queries: Callable[[int], int]) -> Iterator[list[Piece]]:
    """Whole stretches, as many in a launch as its scratch memory allows for the longest of them."""
    pieces: list[Piece] = []
    for stretch in few:
        more = [*pieces, _all_queries(stretch)]
        # A block of queries may be padded to as many as a stretch of few queries can have.
        if pieces and FEW * len(more) > most_queries(max(piece.length for piece in more)):
            yield pieces
            more = more[-1:]
        pieces = more
    if pieces:
        yield pieces


def _slices(stretch: Stretch, topk: int, block: int) -> Iterator[Piece]:
    """A stretch in pieces of whole blocks that fit the scratch memory of selection."""
    total = stretch.stop - stretch.start
    most = selection.most_queries(stretch.length, topk, block)
    for begin in range(0, total, most):
        yield Piece(stretch, begin, min(total, begin + most))


def _select(
    indexer_q: Tensor, gate: Tensor, pieces: Sequence[Piece], pools: Pools, topk: int, *, alone: bool
) -> tuple[Batch, Tensor]:
    """The batch of some pieces and its sets, int32 [B, topk]."""
    assert pools.indexer_k is not None, "this model has no indexer"
    batch = make_batch(pieces, selection.block_queries(indexer_q, alone=alone), indexer_q.device)
    return batch, selection.select_rows(indexer_q, gate, batch, pools.indexer_k, topk)


def _attend_masked(q: Tensor, chosen: Tensor, piece: Piece, pools: Pools, out: Tensor) -> None:
    """Attention over every key with the sets as a mask, in slices of queries whose masks fit the scratch memory."""
    width = piece.length + 1  # the last column takes the -1 that fill the sets
    block = attention.block_queries(q.shape[1] // pools.k.format.heads, q.dtype, alone=False)
    most = max(block, _MASK_BYTES // width // block * block)
    for begin in range(0, chosen.shape[0], most):
        part = chosen[begin : begin + most].long()
        batch = make_batch(
            [Piece(piece.stretch, piece.begin + begin, piece.begin + begin + len(part))], block, q.device
        )
        mask = torch.zeros(batch.queries, width, dtype=torch.bool, device=q.device)
        mask[: len(part)].scatter_(1, part.where(part >= 0, width - 1), True)
        attention.attend_tiles(q, batch, pools, out, split=False, mask=mask)


def _count(selected: Tensor, counts: Tensor | None) -> None:
    """Adds every selected position to `counts`."""
    if counts is None:
        return
    if counts.device == selected.device and counts.is_contiguous() and counts.dtype == torch.int64:
        selection.tally(selected.contiguous(), counts)
    else:
        chosen = selected[selected >= 0].to(counts.device, torch.int64)
        counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
