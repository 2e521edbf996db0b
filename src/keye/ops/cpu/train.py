"""Attention in training by the compiled core, forward and backward: dense, and over sets of keys.

`keye.ops.tree` says what is computed, `keye.ops.tree_tiles` is the definition, `native/train.h` the C interface.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from keye.ops.tree_tiles import Needs, Operands, Saved, Segment

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_POINTERS: Final = (
    "q", "k", "v", "indexer_q", "indexer_k", "gate", "sets", "out", "lse", "indexer_lse", "grad_out", "grad_q",
    "grad_k", "grad_v", "grad_indexer_q", "grad_indexer_k", "grad_gate", "blocks", "pieces", "intervals",
)  # fmt: skip
_MULTIPLE, _MAX_DIM = 32, 256
#: Up to this many times k keys, attention of a prefill block over its sets is computed over every key with a mask:
#: packing tiles once for all queries then beats reading each query's rows. `masked_crossover` of
#: `python -m benchmarks.attention` measures it. Training does the same, so that its numbers are those of inference.
MASKED_UP_TO: Final = 1.125
#: Queries of a prefill block.
_PREFILL_BLOCK = 32
#: Rows (query and head) and queries of a block of dense attention.
_BLOCK_ROWS, _BLOCK_QUERIES = 128, 64


class _Train(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("queries", "keys", "width", "block_count")),
        ("kl", ctypes.c_double),
        *((name, ctypes.c_int32) for name in (
            "dtype", "heads", "groups", "dim", "indexer_heads", "indexer_dim", "threads", "reserved")),
    )  # fmt: skip


def declare(core: ctypes.CDLL) -> None:
    core.keye_train_rows.argtypes, core.keye_train_rows.restype = (ctypes.c_int,), ctypes.c_int
    for name in ("keye_train_forward", "keye_train_backward"):
        getattr(core, name).argtypes, getattr(core, name).restype = (ctypes.c_void_p,), ctypes.c_int


@dataclass(frozen=True)
class _Blocks:
    """Blocks of dense attention as `native/train.h` has them: int64 [n, 4], [n, 4] and [n, 2]."""

    blocks: Tensor
    pieces: Tensor
    intervals: Tensor


@lru_cache(maxsize=16)
def _blocks(segments: tuple[Segment, ...], queries: int) -> _Blocks:
    """Blocks of at most so many queries of segments that have the same ancestors."""
    siblings: dict[tuple[tuple[int, int], ...], list[Segment]] = {}
    for segment in segments:
        siblings.setdefault(segment.keys[:-1], []).append(segment)
    blocks, pieces, intervals = list[tuple[int, ...]](), list[tuple[int, ...]](), list[tuple[int, int]]()
    for shared, members in siblings.items():
        before, first_interval = sum(stop - start for start, stop in shared), len(intervals)
        intervals += shared
        first_piece, room = len(pieces), queries
        for segment in members:
            at, own = segment.start, segment.first - before
            while at < segment.stop:
                count = min(room, segment.stop - at)
                pieces.append((at, count, segment.keys[-1][0], own + at - segment.start))
                at, room = at + count, room - count
                if room == 0:
                    blocks.append((first_piece, len(pieces), first_interval, len(intervals)))
                    first_piece, room = len(pieces), queries
        if first_piece < len(pieces):
            blocks.append((first_piece, len(pieces), first_interval, len(intervals)))

    def numbers(rows: list[tuple[int, ...]], width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, width)

    return _Blocks(numbers(blocks, 4), numbers(pieces, 4), numbers([*intervals], 2))


@lru_cache(maxsize=16)
def _begin(segments: tuple[Segment, ...], topk: int) -> tuple[Segment, ...]:
    """The queries whose sets inference applies as masks: those at the beginning of their sequence."""
    limit = int(topk * MASKED_UP_TO) // _PREFILL_BLOCK * _PREFILL_BLOCK
    return tuple(
        segment._replace(stop=min(segment.stop, segment.start + limit - segment.first))
        for segment in segments
        if segment.first < limit
    )


def takes(operands: Operands, sets: Tensor | None) -> bool:
    """Whether the core can compute these; the indexer is taught over sets only."""
    q, k, v, indexer_q, indexer_k, gate = operands
    dims = [q.shape[2]]
    if sets is None and indexer_q is not None:
        return False
    if indexer_q is not None and indexer_k is not None:
        dims.append(indexer_q.shape[2])
        if not indexer_q.dtype == indexer_k.dtype == q.dtype:
            return False
    return (
        q.device.type == "cpu" and q.dtype in _DTYPES and q.dtype == k.dtype == v.dtype and k.shape == v.shape
        and q.numel() > 0 and all(dim % _MULTIPLE == 0 and dim <= _MAX_DIM for dim in dims)
        and (gate is None or gate.dtype == torch.float32)
    )  # fmt: skip


def forward(
    core: ctypes.CDLL, operands: Operands, segments: tuple[Segment, ...], sets: Tensor | None, *, teach: bool
) -> tuple[Saved, Tensor]:
    """`keye.ops.tree_tiles.forward`."""
    q = operands.q
    # Dense attention writes the rows of segments only.
    saved = Saved(
        torch.zeros(q.shape, dtype=q.dtype, device=q.device), torch.full(q.shape[:2], torch.inf, device=q.device),
        torch.empty(len(q), device=q.device) if teach else None,
    )  # fmt: skip
    blocks_of = segments if sets is None else _begin(segments, sets.shape[1])
    call, alive = _call(core, operands if teach else Operands(*operands[:3]), blocks_of, sets, saved)
    _run(core.keye_train_forward, call)
    del alive
    return saved, torch.tensor(call.kl, dtype=torch.float32)


def backward(
    core: ctypes.CDLL, operands: Operands, segments: tuple[Segment, ...], sets: Tensor | None, saved: Saved,
    grad_out: Tensor, grad_kl: Tensor, needs: Needs,
) -> list[Tensor | None]:  # fmt: skip
    """`keye.ops.tree_tiles.backward`."""
    call, alive = _call(core, operands, segments if sets is None else (), sets, saved)
    grad_out = grad_out.contiguous()
    wanted = [*(needs.attention,) * 3, *(needs.indexer,) * 3]
    grads = [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x is not None and want else None
        for x, want in zip(operands, wanted, strict=True)
    ]
    for name, grad in zip(Operands._fields, grads, strict=True):
        setattr(call, f"grad_{name}", None if grad is None else grad.data_ptr())
    call.grad_out, call.kl = grad_out.data_ptr(), float(grad_kl)
    _run(core.keye_train_backward, call)
    del alive
    return grads


def _call(
    core: ctypes.CDLL, operands: Operands, segments: tuple[Segment, ...], sets: Tensor | None, saved: Saved
) -> tuple[_Train, list[Tensor]]:
    """The call without gradients, and what must stay alive while the library reads."""
    (T, H, D), (S, G, _), dtype = operands.q.shape, operands.k.shape, _DTYPES.index(operands.q.dtype)
    rows = _DTYPES[core.keye_train_rows(dtype)]
    call = _Train(queries=T, keys=S, dtype=dtype, heads=H, groups=G, dim=D, threads=torch.get_num_threads())
    tensors: dict[str, Tensor | None] = operands._asdict() | saved._asdict()
    if segments:
        blocks = _blocks(segments, max(1, min(_BLOCK_QUERIES, _BLOCK_ROWS * G // H)))
        call.block_count = len(blocks.blocks)
        tensors |= {"blocks": blocks.blocks, "pieces": blocks.pieces, "intervals": blocks.intervals}
    if sets is not None:
        call.width, tensors["sets"] = sets.shape[1], sets
    if operands.indexer_q is not None:
        call.indexer_heads, call.indexer_dim = operands.indexer_q.shape[1:]
    for name in ("k", "v", "indexer_k"):
        x = tensors[name]
        tensors[name] = None if x is None else x.to(rows)
    alive = []
    for name, x in tensors.items():
        if x is not None:
            alive.append(x.detach().contiguous())
            setattr(call, name, alive[-1].data_ptr())
    return call, alive


def _run(function: ctypes._NamedFuncPointer, call: _Train) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("the compiled core found no memory for its scratch")
