"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) in plain torch, in two forms of one function.

The cache keeps a latent and a rotary key for each token, shared by all heads. Keys and values of head h are
`weight[h] @ latent`. *Expanded*, they are computed tile by tile, as the report defines it: right for many queries.
*Absorbed*, the weight is applied to the queries and to the outputs instead, and latents are attended to as they are:
right for few queries. Legend: T queries, S keys, H heads, N and R dimensions of a query without and with rotation, V
those of a value, C those of a latent. Scratch is bounded at any length: no [T, S] tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from keye.ops.reference import SCRATCH_BYTES, attend_tiles

LatentRows = Callable[[int, int], tuple[Tensor, Tensor]]
"""(start, stop) -> latents [n, C] and rotated keys [n, R] of these positions."""
#: `auto` is whichever takes fewer multiplications.
Form = Literal["auto", "absorbed", "expanded"]
#: Queries for which a tile of keys is expanded once.
EXPANDED_BLOCK: Final = 1024


class LatentQuery(NamedTuple):
    """Queries `nope` [T, H, N] and, rotated, `rope` [T, H, R]; `weight` [H, N + V, C], which makes keys and values of
    latents; the `scale` of scores."""

    nope: Tensor
    rope: Tensor
    weight: Tensor
    scale: float

    def part(self, start: int, stop: int) -> LatentQuery:
        """Those of some tokens."""
        return self._replace(nope=self.nope[start:stop], rope=self.rope[start:stop])


def expand(latent: Tensor, rope_k: Tensor, weight: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Latents [n, C] and rotary keys [n, R] -> keys [n, H, N + R] and values [n, H, V], in the dtype of `weight`
    [H, N + V, C]; `nope` is N."""
    H, width, _ = weight.shape
    rows = torch.matmul(latent.to(weight.dtype), weight.flatten(0, 1).mT).view(-1, H, width)
    rope_k = rope_k.to(weight.dtype).unsqueeze(1).expand(-1, H, -1)
    return torch.cat((rows[..., :nope], rope_k), dim=2), rows[..., nope:]


def latent_attention(query: LatentQuery, rows: LatentRows, first: int, form: Form = "auto") -> Tensor:
    """Causal attention of queries at positions `first` .. over every key up to their own; [T, H, V] in their dtype."""
    if form == "auto":
        form = "expanded" if _is_expanded_cheaper(query, first) else "absorbed"
    return (_expanded if form == "expanded" else _absorbed)(query, rows, first)


def _is_expanded_cheaper(query: LatentQuery, first: int) -> bool:
    """Whether multiplications saved at every pair of a query and a key outweigh those that expand every key."""
    T, width, C = query.nope.shape[0], query.weight.shape[1], query.weight.shape[2]
    pairs = T * first + T * (T + 1) // 2
    return pairs * (2 * C - width) > (first + T) * C * width


def _absorbed(query: LatentQuery, rows: LatentRows, first: int) -> Tensor:
    """One key of C + R numbers for all heads, whose first C are its value."""
    T, H, N = query.nope.shape
    C, R = query.weight.shape[2], query.rope.shape[2]
    to_key, to_value = query.weight[:, :N], query.weight[:, N:]
    block = max(1, SCRATCH_BYTES // 4 // (12 * H * C))
    tile = max(1, SCRATCH_BYTES // 2 // (20 * (C + R) + 12 * H * min(T, block)))

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys = torch.cat(rows(start, stop), dim=1).float().unsqueeze(1)
        return keys, keys[..., :C]

    out = query.nope.new_empty(T, H, query.weight.shape[1] - N)
    for begin in range(0, T, block):
        nope, rope = (
            query.nope[begin : begin + block].transpose(0, 1),
            query.rope[begin : begin + block].transpose(0, 1),
        )
        q = torch.cat((torch.matmul(nope, to_key), rope), dim=2).float() * query.scale  # H B (C + R)
        B = q.shape[1]
        latent = attend_tiles(q.view(1, H * B, C + R), read, first + begin, B, C, tile).view(H, B, C)
        # The weight comes first: torch multiplies few columns by it faster than few rows.
        out[begin : begin + B] = torch.matmul(to_value, latent.to(out.dtype).mT).permute(2, 0, 1)
    return out


def _expanded(query: LatentQuery, rows: LatentRows, first: int) -> Tensor:
    """Keys of N + R numbers and values of V for each head, some heads at a time."""
    (T, H, N), R = query.nope.shape, query.rope.shape[2]
    V, block = query.weight.shape[1] - N, min(T, EXPANDED_BLOCK)
    heads = min(H, max(1, SCRATCH_BYTES // 3 // (12 * block * (N + R + V))))
    tile = max(1, SCRATCH_BYTES // 2 // (heads * (20 * (N + R + V) + 12 * block)))
    out = query.nope.new_empty(T, H, V)
    for head in range(0, H, heads):
        some = slice(head, head + heads)

        def read(start: int, stop: int, weight: Tensor = query.weight[some]) -> tuple[Tensor, Tensor]:
            return expand(*rows(start, stop), weight, N)

        for begin in range(0, T, block):
            part = slice(begin, begin + block)
            q = torch.cat((query.nope[part, some], query.rope[part, some]), dim=2).float() * query.scale
            result = attend_tiles(q.transpose(0, 1), read, first + begin, q.shape[0], V, tile)
            out[part, some] = result.transpose(0, 1).to(out.dtype)
    return out
