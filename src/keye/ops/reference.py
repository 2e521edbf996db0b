"""DeepSeek Sparse Attention on grouped-query attention, in plain torch: the definition, and the oracle.

Legend: T queries, S keys, H query heads, G key/value heads (groups), D head dim, J indexer heads, I indexer dim,
K selected keys. Query `t` sits at absolute position `first + t` and may see keys `0 .. first + t`.

The index score of query t and key s is  I[t,s] = sum_j gate[t,j] * relu(q[t,j] . k[s])  (Keye-VL-2.0 report, DSA);
the K largest causal scores form one set, shared by all heads and groups, and attention is exact over that set.

Two promises hold here:

* Scratch memory is set by a budget. Queries are taken in blocks, keys in tiles; no [T, S] tensor exists.
* Selection depends on q, k and gates alone, not on how a prompt was cut. Each score is always computed by the same
  matrix product: queries and keys sit at the row and column that their absolute positions give them in blocks of fixed
  shape (padded with zeros). Equal scores are decided by position, earlier first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Queries in one scoring block; fixed, since the shape of a matrix product may decide its last bits.
QUERY_BLOCK = 32
#: Keys in one scoring tile.
KEY_TILE = 1024
#: Queries that dense attention takes at once: enough to be worth reading a tile of keys for.
DENSE_BLOCK = 128
#: Bytes that one call may use for scores and gathered rows.
SCRATCH_BYTES = 96 * 2**20
#: The largest finite magnitude of float8 e4m3 and the floor of a block's maximum, as in the official quantiser.
FP8_MAX = 448.0
FP8_AMAX_FLOOR = 1e-4

KeyTiles = Callable[[int, int], Tensor]
"""(start, stop) -> indexer keys [stop - start, I] of these positions."""
Rows = Callable[[Tensor], tuple[Tensor, Tensor]]
"""positions int64 [N] -> keys [N, G, D] and values [N, G, D]."""


def hadamard_transform(x: Tensor) -> Tensor:
    """Sylvester-Hadamard transform over the last dimension (a power of two), scaled by dim ** -0.5.

    Computed in float32 and rounded to the input dtype. Orthonormal, so dot products keep their value; it spreads
    outliers over the vector before quantisation.
    """
    transformed: Tensor = _Hadamard.apply(x)
    return transformed


class _Hadamard(torch.autograd.Function):
    """The transform is its own gradient. Numbers lie transposed meanwhile, so that every sum is one of long rows; what
    torch compiles cannot write into a part of a tensor, and makes new ones of the same sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        assert dim & (dim - 1) == 0, "a Hadamard transform needs a power of two"
        y = x.reshape(-1, dim).mT.float().contiguous()
        compiling = torch.compiler.is_compiling()
        other, step = y if compiling else torch.empty_like(y), 1
        while step < dim:
            shape = (dim // (2 * step), 2, step, y.shape[1])
            pairs = y.view(shape)
            if compiling:
                sums = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
                y, step = sums.view(y.shape), 2 * step
                continue
            sums = other.view(shape)
            torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
            torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
            y, other, step = other, y, 2 * step
        # In memory as its shape says: kernels that read it by address count on that.
        return (y * dim**-0.5).to(x.dtype).mT.contiguous().view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return hadamard_transform(grad)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds vectors to float8 e4m3 with one power-of-two scale each (ue8m0), as the official indexer does.

    Returns `values` (float32, the shape of `x`, each a value of e4m3) and `scale` [..., 1], with x ~ values * scale.
    """
    amax = x.float().abs().amax(-1, keepdim=True).clamp_min(FP8_AMAX_FLOOR)
    scale = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
    values = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    return values, scale


def round_queries(x: Tensor) -> Tensor:
    """Rounds vectors to int8 codes times a power of two each, the smallest for which codes stay in -127 .. 127: what
    meets indexer keys that are stored as int8. Exact in every floating dtype, and rounding twice changes nothing."""
    mantissa, exponent = torch.frexp(x.float().abs().amax(-1, keepdim=True))
    exponent = torch.where(mantissa > 127 / 128, exponent - 6, exponent - 7).clamp_min(-100)
    return torch.ldexp(torch.ldexp(x.float(), -exponent).round(), exponent).to(x.dtype)


def indexer_scores(q_TJI: Tensor, k_SI: Tensor, gate_TJ: Tensor) -> Tensor:
    """I[t,s] without mask, float32 [T, S]. The definition; `select_topk` computes the same in blocks."""
    logits_TJS = torch.matmul(q_TJI.float(), k_SI.float().transpose(-1, -2))
    return (gate_TJ.float().unsqueeze(-1) * logits_TJS.relu_()).sum(-2)


def select_topk(
    q_TJI: Tensor, gate_TJ: Tensor, key_tiles: KeyTiles, first: int, topk: int
) -> Iterator[tuple[int, Tensor]]:
    """Selects keys block by block; yields `(offset, positions)` with `positions` int64 [n, topk] for queries
    `offset .. offset + n`. Positions ascend; a query with fewer than `topk` causal keys is filled with -1 at the end.
    """
    total = q_TJI.shape[0]
    start = 0
    while start < total:
        block = (first + start) // QUERY_BLOCK * QUERY_BLOCK
        stop = min(total, block + QUERY_BLOCK - first)
        rows = slice(first + start - block, first + stop - block)
        q_BJI = q_TJI.new_zeros(QUERY_BLOCK, *q_TJI.shape[1:], dtype=torch.float32)
        gate_BJ = gate_TJ.new_zeros(QUERY_BLOCK, gate_TJ.shape[1], dtype=torch.float32)
        q_BJI[rows], gate_BJ[rows] = q_TJI[start:stop].float(), gate_TJ[start:stop].float()
        yield start, _topk_of_block(q_BJI, gate_BJ, key_tiles, block, first + stop, topk)[rows]
        start = stop


def select_recent(
    total: int, first: int, topk: int, device: torch.device | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A control without learning: the `topk` most recent positions. Yields as `select_topk` does."""
    for start in range(0, total, QUERY_BLOCK):
        last = first + torch.arange(start, min(total, start + QUERY_BLOCK), device=device).unsqueeze(1)
        begin = (last + 1 - topk).clamp_min(0)
        positions = begin + torch.arange(topk, device=device)
        yield start, positions.masked_fill(positions > last, -1)


def select_random(total: int, first: int, topk: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """A control: `topk` causal positions at random, the query's own among them; drawn on the generator's device.
    Yields as `select_topk` does."""
    device = generator.device
    for start in range(0, total, QUERY_BLOCK):
        last = first + torch.arange(start, min(total, start + QUERY_BLOCK), device=device).unsqueeze(1)
        columns = torch.arange(int(last.max()) + 1, device=device)
        scores = torch.rand(last.shape[0], columns.numel(), generator=generator, device=device)
        scores = scores.masked_fill(columns > last, -torch.inf).masked_fill(columns == last, 2.0)
        width = min(topk, columns.numel())
        keep = topk_mask(scores, width)
        positions = columns.expand_as(scores)[keep].view(-1, width)
        positions = positions.masked_fill(positions > last, -1)
        yield start, torch.nn.functional.pad(positions, (0, topk - width), value=-1)


def _topk_of_block(q_BJI: Tensor, gate_BJ: Tensor, key_tiles: KeyTiles, block: int, length: int, topk: int) -> Tensor:
    """Running top-k of one aligned block of queries over all key tiles below `length`. Returns int64 [B, topk]."""
    device = q_BJI.device
    limit_B1 = torch.arange(block, block + QUERY_BLOCK, device=device).unsqueeze(1)
    scores = torch.empty(QUERY_BLOCK, 0, device=device)
    positions = torch.empty(QUERY_BLOCK, 0, dtype=torch.int64, device=device)
    for tile in range(0, length, KEY_TILE):
        stop = min(length, tile + KEY_TILE)
        k_SI = q_BJI.new_zeros(KEY_TILE, q_BJI.shape[2])
        k_SI[: stop - tile] = key_tiles(tile, stop).float()
        tile_positions = torch.arange(tile, stop, device=device).expand(QUERY_BLOCK, -1)
        tile_scores = indexer_scores(q_BJI, k_SI, gate_BJ)[:, : stop - tile]
        tile_scores = tile_scores.masked_fill(tile_positions > limit_B1, -torch.inf)
        scores = torch.cat((scores, tile_scores), dim=1)
        positions = torch.cat((positions, tile_positions), dim=1)
        if scores.shape[1] > topk:
            keep = topk_mask(scores, topk)
            scores, positions = scores[keep].view(-1, topk), positions[keep].view(-1, topk)
    # Earlier positions come first, so causal keys precede the masked ones: sorting is not needed.
    positions = positions.masked_fill(scores == -torch.inf, -1)
    return torch.nn.functional.pad(positions, (0, topk - positions.shape[1]), value=-1)


def topk_mask(scores: Tensor, topk: int) -> Tensor:
    """Boolean mask of the `topk` largest entries of each row, exactly `topk` a row; among equals the first ones win."""
    kth = scores.topk(topk, dim=-1, sorted=True).values[..., -1:]
    above, equal = scores > kth, scores == kth
    missing = topk - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


def sparse_attention(q_THD: Tensor, selection: Iterable[tuple[int, Tensor]], rows: Rows) -> Tensor:
    """Grouped-query attention of each query over its selected set. Returns [T, H, D] in the dtype of `q_THD`.

    `selection` yields `(offset, positions)` as `select_topk` does.
    """
    out = torch.empty_like(q_THD)
    for offset, positions in selection:
        part = slice(offset, offset + positions.shape[0])
        out[part] = attend_union(q_THD[part], positions.to(q_THD.device), rows)
    return out


def attend_union(q_THD: Tensor, positions: Tensor, rows: Rows) -> Tensor:
    """Attention of neighbouring queries, each over its own set: rows of the union are gathered once and masked.

    `positions` int64 [T, K] ascending, -1 for none. A query without any key yields zeros, never NaN.
    """
    union, where = torch.unique(positions, return_inverse=True)
    T, H, D = q_THD.shape
    if T > 1 and union.numel() * H * (5 * D + 12 * T) > SCRATCH_BYTES:  # 20 bytes a row element, at most H/4 groups
        half = T // 2
        return torch.cat([attend_union(q_THD[:half], positions[:half], rows),
                          attend_union(q_THD[half:], positions[half:], rows)])  # fmt: skip
    mask_TU = torch.zeros(T, union.numel(), dtype=torch.bool, device=positions.device)
    mask_TU.scatter_(1, where, True)
    if union[0] < 0:
        union, mask_TU = union[1:], mask_TU[:, 1:]
    if union.numel() == 0:
        return torch.zeros_like(q_THD)
    k_UGD, v_UGD = rows(union)
    return masked_attention(q_THD, k_UGD, v_UGD, mask_TU)


def masked_attention(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, mask_TS: Tensor) -> Tensor:
    """Softmax attention with a mask, in float32, each head on its own. Rows without any key give zeros."""
    T, H, D = q_THD.shape
    G = k_SGD.shape[1]
    q = q_THD.float().view(T, G, H // G, D).permute(1, 2, 0, 3).reshape(G, -1, D) * D**-0.5
    logits = torch.matmul(q, k_SGD.float().permute(1, 2, 0)).view(G, H // G, T, -1)
    logits = logits.masked_fill(~mask_TS, -torch.inf).softmax(-1).nan_to_num_(0.0)
    out = torch.matmul(logits.view(G, (H // G) * T, -1), v_SGD.float().transpose(0, 1))
    return out.view(G, H // G, T, D).permute(2, 0, 1, 3).reshape(T, H, D).to(q_THD.dtype)


def dense_attention(q_THD: Tensor, rows: Rows, first: int) -> Tensor:
    """Causal attention over every earlier key, in float32. Returns [T, H, D] in the dtype of `q_THD`.

    Queries are taken in blocks and keys in tiles of the scratch budget, so that no length makes it grow.
    """
    out = torch.empty_like(q_THD)
    for begin in range(0, q_THD.shape[0], DENSE_BLOCK):
        part = slice(begin, begin + DENSE_BLOCK)
        out[part] = _dense_block(q_THD[part], rows, first + begin)
    return out


def _dense_block(q_BHD: Tensor, rows: Rows, first: int) -> Tensor:
    """One block of queries over tiles of keys. Returns float32 [B, H, D]."""
    B, H, D = q_BHD.shape
    device = q_BHD.device
    # Bytes for each head: 20 an element of a row (as stored and as float32), 12 a score, 12 an element of the sums.
    tile = max(1, (SCRATCH_BYTES // H - 12 * B * D) // (20 * D + 12 * B))
    G = rows(torch.zeros(1, dtype=torch.int64, device=device))[0].shape[1]
    q = q_BHD.float().view(B, G, H // G, D).permute(1, 2, 0, 3).reshape(G, -1, D) * D**-0.5
    out = attend_tiles(q, lambda start, stop: rows(torch.arange(start, stop, device=device)), first, B, D, tile)
    return out.view(G, H // G, B, D).permute(2, 0, 1, 3).reshape(B, H, D)


def attend_tiles(
    q: Tensor, rows: Callable[[int, int], tuple[Tensor, Tensor]], first: int, queries: int, dim: int, tile: int
) -> Tensor:
    """Causal attention of `queries` neighbouring queries, the first at position `first`, over tiles of keys: sums under
    a running maximum, rescaled when a tile raises it (online softmax, Milakov and Gimelshein, arXiv:1805.02867).

    `q` float32 [G, heads of a group x queries, D], scaled. `rows` (start, stop) are keys [n, G, D] and values
    [n, G, dim] of these positions. Returns float32 [G, heads of a group x queries, dim].
    """
    length, device = first + queries, q.device
    last_B1 = torch.arange(first, length, device=device).unsqueeze(1)
    largest, total = q.new_full((*q.shape[:2], 1), -torch.inf), q.new_zeros(*q.shape[:2], 1)
    sums = q.new_zeros(*q.shape[:2], dim)
    for start in range(0, length, tile):
        stop = min(length, start + tile)
        k_SGD, v_SGD = rows(start, stop)
        scores = torch.matmul(q, k_SGD.float().permute(1, 2, 0))
        if stop > first + 1:  # else every query sees the tile
            positions_S = torch.arange(start, stop, device=device)
            scores.view(-1, queries, stop - start).masked_fill_(positions_S > last_B1, -torch.inf)
        # Finite from the first tile on: every query sees key 0.
        raised = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, rescale = scores.sub_(raised).exp_(), (largest - raised).exp_()
        total = total * rescale + weights.sum(-1, keepdim=True)
        sums = sums.mul_(rescale).add_(torch.matmul(weights, v_SGD.float().transpose(0, 1)))
        largest = raised
    return sums / total


def rope_angles(positions: Tensor, inv_freq: Tensor, section: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """M-RoPE cosines and sines, float32 [T, D/2]: contiguous sections of the frequencies follow T, H and W.

    `positions` int [3, T]; `inv_freq` float32 [D/2]; `section` sums to D/2.
    """
    parts = zip(positions.float(), inv_freq.split(section), strict=True)
    angles = torch.cat([axis.unsqueeze(1) * frequencies for axis, frequencies in parts], dim=1)
    return angles.cos(), angles.sin()


def yarn_frequencies(
    dim: int, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """`inverse_frequencies` stretched by YaRN (arXiv:2309.00071) from a context of `original` positions to `factor` as
    many: frequencies with more than `beta_fast` turns in it stay, those with fewer than `beta_slow` are divided by
    `factor`, a ramp leads from the first to the second. As DeepSeek-V3's code, and transformers', have it."""

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), dim - 1)
    turns = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    order = torch.arange(dim // 2, dtype=torch.float32, device=device)
    retained = 1 - ((order - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return 1.0 / (factor * turns) * (1 - retained) + 1.0 / turns * retained


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """1 / theta ** (2i/dim) for i in 0 .. dim/2, float32, with the rounding of the official code."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
