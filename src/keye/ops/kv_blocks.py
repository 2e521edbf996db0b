"""How cached rows are stored in memory: rows of a number format, 64 tokens a KV block.

A KV block is 64 rows behind one another; a row holds all heads of one token, so a selected token is one read. Fast
paths read blocks by address (processor) or by number in a pool (GPU); `RowFormat.decode` is the definition of what they
read.

Legend: N rows, G heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.ops.reference import hadamard_transform, quantize_fp8

#: Tokens of a KV block.
KV_BLOCK: Final = 64
#: Dimensions that share a scale in int4; all of a head where it has fewer.
INT4_GROUP: Final = 64

RowKind = Literal["float32", "float16", "bfloat16", "fp8", "int8", "int4"]
_PLAIN: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16
}  # fmt: skip
_INT8_MAX: Final = 127
#: Scales that are tried for a group of int4 codes, as shares of the one that reaches its largest number. Fewer or more
#: change the error of normal numbers by less than 1 %.
_INT4_SHARES: Final = (1.05, 1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82)
#: Rows whose scales are searched at once, so that scratch memory does not grow with the prompt.
_INT4_ROWS: Final = 256


@dataclass(frozen=True)
class RowSpec:
    """What a model stores of each token under one name in each of its `layers`: `heads` vectors of `dim` numbers.

    Attention reads rows one by one, except where they are `scanned`: all of them at every step, as an indexer's keys.
    Those stay in the memory of the model's device whatever holds the others, and have a number format of their own.
    """

    layers: int
    heads: int
    dim: int
    scanned: bool = False


@dataclass(frozen=True)
class RowFormat:
    """The bytes of one token's row: `heads` vectors of `dim` numbers.

    * `float32`, `float16`, `bfloat16`: the numbers, head by head, lowest byte first.
    * `fp8`: for each head `dim` bytes of float8 e4m3, then a bfloat16 scale, a power of two (the official indexer's).
    * `int8`: for each head `dim` signed codes in -127 .. 127, then a bfloat16 scale.
    * `int4`: each head is first Hadamard transformed (orthonormal, it spreads outliers). Then for each group of
      `group` dimensions `group / 2` bytes: byte i holds dimension i in its low half and dimension i + group / 2 in its
      high half, each as code + 8 with codes in -8 .. 7; after the codes of all groups one bfloat16 scale a group, which
      may be negative.

    A number is code * scale. Scales are rounded before the codes are made, so that rounding them loses nothing.
    """

    kind: RowKind
    heads: int
    dim: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(RowKind):
            kinds = ", ".join(get_args(RowKind))
            raise KeyeError(f"the number format {self.kind!r} is not known; choose one of {kinds}")
        if self.kind == "int4" and (self.dim < 8 or self.dim & (self.dim - 1)):
            raise KeyeError(f"int4 storage needs a head dimension that is a power of two, not {self.dim}; use int8")

    @property
    def plain(self) -> bool:
        """Whether rows are ordinary numbers without scales."""
        return self.kind in _PLAIN

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of plain rows; the one that other rows are best decoded to."""
        return _PLAIN.get(self.kind, torch.bfloat16)

    @property
    def rotated(self) -> bool:
        """Whether the stored vectors are Hadamard transformed: fast paths transform queries (for keys) and outputs (for
        values) instead of every row."""
        return self.kind == "int4"

    @property
    def group(self) -> int:
        """Dimensions that share one scale."""
        return min(INT4_GROUP, self.dim) if self.kind == "int4" else self.dim

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of a row."""
        if self.plain:
            return self.dim * self.dtype.itemsize
        codes = self.dim // 2 if self.kind == "int4" else self.dim
        return codes + 2 * (self.dim // self.group)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a KV block."""
        return KV_BLOCK * self.row_bytes

    def encode(self, x_NGD: Tensor) -> Tensor:
        """Vectors of any floating dtype [N, G, D] -> uint8 [N, row_bytes]."""
        assert x_NGD.shape[1:] == (self.heads, self.dim)
        if self.plain:
            return x_NGD.to(self.dtype).contiguous().flatten(1).view(torch.uint8)
        if self.kind == "fp8":
            values, scale = quantize_fp8(x_NGD)
            codes = values.to(torch.float8_e4m3fn).view(torch.uint8)
        elif self.kind == "int8":
            scale = _scale(x_NGD.float(), _INT8_MAX)
            codes = (x_NGD.float() / scale).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8).view(torch.uint8)
        else:
            grouped = hadamard_transform(x_NGD.float()).unflatten(-1, (-1, self.group))
            scale = torch.cat([_int4_scale(part) for part in grouped.split(_INT4_ROWS)])
            low, high = (_int4_codes(grouped, scale) + 8).to(torch.uint8).chunk(2, dim=-1)
            codes, scale = (low | high << 4).flatten(2), scale.squeeze(-1)
        scales = scale.to(torch.bfloat16).contiguous().view(torch.uint8)
        return torch.cat((codes, scales), dim=-1).flatten(1)

    def decode(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """uint8 [N, row_bytes] -> the vectors [N, G, D] in `dtype` (default: `self.dtype`)."""
        dtype = dtype or self.dtype
        if self.plain:
            return rows.contiguous().view(self.dtype).unflatten(1, (self.heads, self.dim)).to(dtype)
        heads = rows.unflatten(1, (self.heads, self.head_bytes))
        cut = self.head_bytes - 2 * (self.dim // self.group)
        codes, scale = heads[..., :cut], heads[..., cut:].contiguous().view(torch.bfloat16).float()
        if self.kind == "fp8":
            return (codes.contiguous().view(torch.float8_e4m3fn).float() * scale).to(dtype)
        if self.kind == "int8":
            return (codes.contiguous().view(torch.int8).float() * scale).to(dtype)
        halves = codes.unflatten(-1, (-1, self.group // 2))
        values = (torch.cat((halves & 15, halves >> 4), dim=-1).float() - 8) * scale.unsqueeze(-1)
        return hadamard_transform(values.flatten(2)).to(dtype)


def _scale(x: Tensor, largest: int) -> Tensor:
    """The bfloat16 scale of each vector over the last dimension, at least amax / largest, as float32 [..., 1]."""
    exact = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-30)
    rounded = exact.to(torch.bfloat16).float()
    return torch.where(rounded < exact, rounded * (1 + 2**-7), rounded).to(torch.bfloat16).float()


def _int4_scale(x: Tensor) -> Tensor:
    """The bfloat16 scale of each vector over the last dimension that leaves the least squared error among a few, as
    float32 [..., 1]. Its sign makes -8, the code without a counterpart, that of the largest number."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8
    largest = torch.where(largest.abs() < 1e-30, 1e-30, largest)
    tried = largest.unsqueeze(0) * largest.new_tensor(_INT4_SHARES).view(-1, *[1] * largest.dim())
    tried = tried.to(torch.bfloat16).float()
    errors = (_int4_codes(x, tried) * tried - x).square().sum(-1, keepdim=True)
    return tried.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _int4_codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-8, 7)


@dataclass(frozen=True)
class BlockRows:
    """One layer's rows of one name of one sequence, for the fast paths.

    Token t is row t % 64 of KV block t // 64. `addresses` int64 [blocks] are where blocks begin in this process's
    memory (processor only). `pool` uint8 [blocks of the pool, 64, row_bytes] with `table` int32 [blocks] says the same
    where all blocks are in one tensor of a device; None where they do not. `mapped`: the addresses are in a mapped
    file, and rows may have to be read from it first.
    """

    format: RowFormat
    addresses: Tensor | None
    pool: Tensor | None = None
    table: Tensor | None = None
    mapped: bool = False
