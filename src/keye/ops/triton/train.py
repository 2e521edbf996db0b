"""Attention over sets of keys in training, forward and backward, with the loss of the indexer: `keye.ops.tree_tiles` is
the definition.

One program takes one query, and for attention one group of heads; keys are gathered tile by tile. Gradients of keys are
added by atomic operations, in no fixed order: two backward passes may differ in their last bits.

Not run on a card yet: only Triton's interpreter has executed these kernels.

Legend: T queries, S keys, H heads, G groups, R = H / G, D head dim, J indexer heads, I their dim; RP and JP are R and J
padded to what a matrix product takes.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.kv_blocks import RowFormat
from keye.ops.tree_tiles import Needs, Operands, Saved, Segment
from keye.ops.triton import serves
from keye.ops.triton.attention import FEWEST_ROWS, _online
from keye.ops.triton.rows import INTERPRETED, cast, dot_dtype, product

#: Selected keys of a tile.
TILE: Final = 32
_DIMS: Final = (16, 32, 64, 128)
_LOG2_E: Final = 1.4426950408889634
_LN_2: Final = 0.6931471805599453


def takes(operands: Operands, sets: Tensor | None) -> bool:
    """Whether the kernels can compute these."""
    q, k, v, indexer_q, indexer_k, _ = operands
    known = [x for x in (q, k, v, indexer_q, indexer_k) if x is not None]
    return (
        sets is not None and serves(q) and k.shape == v.shape
        and all(x.dtype == q.dtype and x.shape[-1] in _DIMS for x in known)
    )  # fmt: skip


# Inside kernels. Names in capitals are compile-time constants.


@triton.jit
def _tile_rows(sets, query, width, tile, BN: tl.constexpr):
    """Rows int64 [BN] of a part of a query's set, and which of them there are."""
    index = tile + tl.arange(0, BN)
    row = tl.load(sets + query.to(tl.int64) * width + index, mask=index < width, other=-1)
    return tl.maximum(row, 0).to(tl.int64), row >= 0


@triton.jit
def _heads(x, query, first, heads, REAL: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr):
    """REAL heads of a query from head `first` on, [PADDED, D] with zeros behind them."""
    lane, dims = tl.arange(0, PADDED), tl.arange(0, D)
    at = (query.to(tl.int64) * heads + first + lane)[:, None] * D + dims[None, :]
    return tl.load(x + at, mask=(lane < REAL)[:, None], other=0.0)


@triton.jit
def _keys(x, rows, keep, group, groups, D: tl.constexpr):
    """One head of rows of keys, [N, D]."""
    at = (rows * groups + group)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=keep[:, None], other=0.0)


@triton.jit
def _probabilities(
    q, k, lse, query, rows, keep, group, groups, heads, scale,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Those of the heads of a group, float32 [RP, N]."""
    x = _heads(q, query, group * R, heads, R, RP, D)
    s = product(x, tl.trans(_keys(k, rows, keep, group, groups, D)), DOT, INTERPRETED) * scale
    lane = tl.arange(0, RP)
    total = tl.load(lse + query.to(tl.int64) * heads + group * R + lane, mask=lane < R, other=float("inf"))
    return tl.where(keep[None, :], tl.exp2(tl.minimum(s - total[:, None], 0.0)), 0.0)


@triton.jit
def _scores(x, gate, keys, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    """relu(q . k) [JP, N] of the indexer, and scores as logits to base 2 [N]."""
    products = tl.maximum(product(x, tl.trans(keys), DOT, INTERPRETED), 0.0)
    return products, tl.sum(products * gate[:, None], 0) * 1.4426950408889634


@triton.jit
def _attend_kernel(
    q, k, v, sets, out, lse, width, heads, groups, scale,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    query, group = tl.program_id(0), tl.program_id(1)
    x = _heads(q, query, group * R, heads, R, RP, D)
    largest = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    sums = tl.zeros([RP, D], tl.float32)
    for tile in range(0, width, BN):
        rows, keep = _tile_rows(sets, query, width, tile, BN)
        largest, total, sums = _online(
            x, _keys(k, rows, keep, group, groups, D), _keys(v, rows, keep, group, groups, D), keep[None, :],
            largest, total, sums, scale, DOT, INTERPRETED,
        )  # fmt: skip
    lane = tl.arange(0, RP)
    head = query.to(tl.int64) * heads + group * R + lane
    some = total > 0.0
    y = sums / tl.where(some, total, 1.0)[:, None]
    at = head[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + at, cast(y, out.dtype.element_ty, INTERPRETED), mask=(lane < R)[:, None])
    logarithm = tl.where(some, largest + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse + head, logarithm, mask=lane < R)


@triton.jit
def _loss_kernel(
    q, k, lse, indexer_q, indexer_k, gates, sets, indexer_lse, loss, width, heads, groups, indexer_heads, scale,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, G: tl.constexpr, J: tl.constexpr, JP: tl.constexpr,
    I: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The loss of one query, and the logarithm of the sum of its indexer's exponentials."""
    query = tl.program_id(0)
    x = _heads(indexer_q, query, 0, indexer_heads, J, JP, I)
    lane = tl.arange(0, JP)
    gate = tl.load(gates + query.to(tl.int64) * indexer_heads + lane, mask=lane < J, other=0.0)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for tile in range(0, width, BN):
        rows, keep = _tile_rows(sets, query, width, tile, BN)
        _, scores = _scores(x, gate, _keys(indexer_k, rows, keep, 0, 1, I), DOT, INTERPRETED)
        scores = tl.where(keep, scores, float("-inf"))
        raised = tl.maximum(largest, tl.max(scores, 0))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(scores - base), 0)
        largest = raised
    some = total > 0.0
    logarithm = tl.where(some, largest + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(indexer_lse + query + tl.arange(0, 1), logarithm)
    sum_of_logs = tl.zeros([1], tl.float32)
    for tile in range(0, width, BN):
        rows, keep = _tile_rows(sets, query, width, tile, BN)
        _, scores = _scores(x, gate, _keys(indexer_k, rows, keep, 0, 1, I), DOT, INTERPRETED)
        log_q = tl.where(keep, scores - logarithm, 0.0)
        for group in tl.static_range(G):
            p = _probabilities(q, k, lse, query, rows, keep, group, groups, heads, scale, R, RP, D, DOT, INTERPRETED)
            mean = tl.sum(p, 0) / R
            log_p = tl.log2(tl.where(mean > 0.0, mean, 1.0))
            sum_of_logs += tl.sum(mean * (log_p - log_q), 0)
    tl.store(loss + query + tl.arange(0, 1), sum_of_logs * 0.6931471805599453)


@triton.jit
def _attend_backward_kernel(
    q, k, v, out, lse, grad_out, sets, grad_q, grad_k, grad_v, width, heads, groups, scale, root,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    query, group = tl.program_id(0), tl.program_id(1)
    x = _heads(q, query, group * R, heads, R, RP, D)
    up = _heads(grad_out, query, group * R, heads, R, RP, D)
    y = _heads(out, query, group * R, heads, R, RP, D)
    delta = tl.sum(up.to(tl.float32) * y.to(tl.float32), 1)
    sums = tl.zeros([RP, D], tl.float32)
    dims = tl.arange(0, D)
    for tile in range(0, width, BN):
        rows, keep = _tile_rows(sets, query, width, tile, BN)
        p = _probabilities(q, k, lse, query, rows, keep, group, groups, heads, scale, R, RP, D, DOT, INTERPRETED)
        slope = product(up, tl.trans(_keys(v, rows, keep, group, groups, D)), DOT, INTERPRETED)
        slope = p * (slope - delta[:, None]) * root
        sums += product(slope, _keys(k, rows, keep, group, groups, D), DOT, INTERPRETED)
        at = (rows * groups + group)[:, None] * D + dims[None, :]
        tl.atomic_add(grad_k + at, product(tl.trans(slope), x, DOT, INTERPRETED), mask=keep[:, None])
        tl.atomic_add(grad_v + at, product(tl.trans(p), up, DOT, INTERPRETED), mask=keep[:, None])
    lane = tl.arange(0, RP)
    at = (query.to(tl.int64) * heads + group * R + lane)[:, None] * D + dims[None, :]
    tl.store(grad_q + at, cast(sums, grad_q.dtype.element_ty, INTERPRETED), mask=(lane < R)[:, None])


@triton.jit
def _teach_kernel(
    q, k, lse, indexer_q, indexer_k, gates, indexer_lse, sets, grad_kl, grad_q, grad_k, grad_gate,
    width, heads, groups, indexer_heads, scale,
    R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, G: tl.constexpr, J: tl.constexpr, JP: tl.constexpr,
    I: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    x = _heads(indexer_q, query, 0, indexer_heads, J, JP, I)
    lane, dims = tl.arange(0, JP), tl.arange(0, I)
    head = query.to(tl.int64) * indexer_heads + lane
    gate = tl.load(gates + head, mask=lane < J, other=0.0)
    logarithm, weight = tl.load(indexer_lse + query), tl.load(grad_kl) * G
    sums, of_gate = tl.zeros([JP, I], tl.float32), tl.zeros([JP], tl.float32)
    for tile in range(0, width, BN):
        rows, keep = _tile_rows(sets, query, width, tile, BN)
        teacher = tl.zeros([BN], tl.float32)
        for group in tl.static_range(G):
            p = _probabilities(q, k, lse, query, rows, keep, group, groups, heads, scale, R, RP, D, DOT, INTERPRETED)
            teacher += tl.sum(p, 0) / (R * G)
        keys = _keys(indexer_k, rows, keep, 0, 1, I)
        products, scores = _scores(x, gate, keys, DOT, INTERPRETED)
        student = tl.where(keep, tl.exp2(tl.minimum(scores - logarithm, 0.0)), 0.0)
        slope = (student - teacher) * weight
        of_gate += tl.sum(products * slope[None, :], 1)
        slopes = tl.where(products > 0.0, slope[None, :] * gate[:, None], 0.0)
        sums += product(slopes, keys, DOT, INTERPRETED)
        at = rows[:, None] * I + dims[None, :]
        tl.atomic_add(grad_k + at, product(tl.trans(slopes), x, DOT, INTERPRETED), mask=keep[:, None])
    at = head[:, None] * I + dims[None, :]
    tl.store(grad_q + at, cast(sums, grad_q.dtype.element_ty, INTERPRETED), mask=(lane < J)[:, None])
    tl.store(grad_gate + head, of_gate, mask=lane < J)


def forward(
    operands: Operands, segments: tuple[Segment, ...], sets: Tensor | None, *, teach: bool
) -> tuple[Saved, Tensor]:
    """`keye.ops.tree_tiles.forward` over sets."""
    assert sets is not None
    operands, q = _contiguous(operands), operands.q
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(q.shape[:2], device=q.device)
    shape, sizes = _shape(operands, sets), _sizes(operands)
    _attend_kernel[(len(q), operands.k.shape[1])](operands.q, operands.k, operands.v, sets, out, lse, *shape, **sizes)
    if not teach:
        return Saved(out, lse, None), torch.zeros((), device=q.device)
    assert operands.indexer_q is not None
    indexer_lse, loss = torch.empty(2, len(q), device=q.device)
    *before, scale = shape
    _loss_kernel[(len(q),)](
        operands.q, operands.k, lse, *operands[3:], sets, indexer_lse, loss, *before, operands.indexer_q.shape[1],
        scale, **sizes, **_indexer_sizes(operands),
    )  # fmt: skip
    return Saved(out, lse, indexer_lse), loss.sum()


def backward(
    operands: Operands, segments: tuple[Segment, ...], sets: Tensor | None, saved: Saved, grad_out: Tensor,
    grad_kl: Tensor, needs: Needs,
) -> list[Tensor | None]:  # fmt: skip
    """`keye.ops.tree_tiles.backward` over sets."""
    assert sets is not None
    operands, grads = _contiguous(operands), list[Tensor | None]([None] * 6)
    (q, k, v, indexer_q, indexer_k, gate), shape, sizes = operands, _shape(operands, sets), _sizes(operands)
    if needs.attention:
        grad_q, grad_k, grad_v = torch.empty_like(q), _zeros(k), _zeros(v)
        _attend_backward_kernel[(len(q), k.shape[1])](
            q, k, v, saved.out, saved.lse, grad_out.contiguous(), sets, grad_q, grad_k, grad_v, *shape,
            q.shape[2] ** -0.5, **sizes,
        )  # fmt: skip
        grads[:3] = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
    if needs.indexer:
        assert indexer_q is not None and indexer_k is not None and gate is not None
        grad_q, grad_k, grad_gate = torch.empty_like(indexer_q), _zeros(indexer_k), torch.empty_like(gate)
        *before, scale = shape
        _teach_kernel[(len(q),)](
            q, k, saved.lse, indexer_q, indexer_k, gate, saved.indexer_lse, sets, grad_kl.float().contiguous(), grad_q,
            grad_k, grad_gate, *before, indexer_q.shape[1], scale, **sizes, **_indexer_sizes(operands),
        )  # fmt: skip
        grads[3:] = grad_q, grad_k.to(indexer_k.dtype), grad_gate
    return grads


def _contiguous(operands: Operands) -> Operands:
    return Operands(*(None if x is None else x.detach().contiguous() for x in operands))  # type: ignore[arg-type]


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.float32)


def _shape(operands: Operands, sets: Tensor) -> tuple[int, int, int, float]:
    (_, heads, dim), groups = operands.q.shape, operands.k.shape[1]
    return sets.shape[1], heads, groups, float(dim**-0.5) * _LOG2_E


def _sizes(operands: Operands) -> dict[str, Any]:
    (_, heads, dim), groups = operands.q.shape, operands.k.shape[1]
    ratio = heads // groups
    kind = {torch.float32: "float32", torch.float16: "float16"}.get(operands.q.dtype, "bfloat16")
    return {
        "R": ratio, "RP": max(FEWEST_ROWS, triton.next_power_of_2(ratio)), "D": dim, "BN": TILE,
        "DOT": dot_dtype(operands.q, RowFormat(kind, groups, dim)), "INTERPRETED": INTERPRETED,  # type: ignore[arg-type]
    }  # fmt: skip


def _indexer_sizes(operands: Operands) -> dict[str, Any]:
    assert operands.indexer_q is not None
    heads, dim = operands.indexer_q.shape[1:]
    padded = max(FEWEST_ROWS, triton.next_power_of_2(heads))
    return {"G": operands.k.shape[1], "J": heads, "JP": padded, "I": dim}
