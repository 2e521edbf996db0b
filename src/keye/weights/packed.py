"""Matrices that other quantisers have packed, as sources of weights: codes of a few bits with scales and, where the
format has them, zero points or minima. `PackedTensor` does what all formats have in common; the modules beside it know
how each lays out its bytes.

Legend: M outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from keye.ops.quantized import QuantFormat, QuantTensor
from keye.weights.float8 import check_codes
from keye.weights.safetensors import PIECE_BYTES, StoredTensor
from keye.weights.source import WeightsError

#: Codes as they are stored and K -> codes as `QuantFormat` has them.
Unpack = Callable[[Tensor, int], Tensor]
#: Scales [rows, G] as they are stored and the rows of scales that they are -> minima [rows, G].
Minima = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Packed:
    """A packed matrix [M, K] of a file. `scales` are stored for each row or block of rows, [rows, G] or [rows], or are
    one number for all."""

    name: str
    shape: tuple[int, int]
    form: QuantFormat
    codes: StoredTensor
    scales: StoredTensor
    unpack: Unpack
    minima: Minima | None = None

    def read(self, begin: int, end: int) -> QuantTensor:
        """Rows `begin .. end`, from the beginning of a block on. `WeightsError` for scales that are not finite."""
        form, shape = self.form, (end - begin, self.shape[1])
        rows = slice(begin // form.rows, -(-end // form.rows))
        scales = read_rows(self.scales, rows)
        minima = None if self.minima is None else self.minima(scales, rows)
        if not all(bool(tensor.isfinite().all()) for tensor in (scales, minima) if tensor is not None):
            raise WeightsError(f"the scales of {self.name} hold numbers that are not finite; fetch {self.scales.file} "
                               "again")  # fmt: skip
        scales = scales.to(form.scale_dtype).expand(form.scale_shape(shape)).contiguous()
        if minima is not None:
            minima = minima.to(form.scale_dtype).expand(form.scale_shape(shape)).contiguous()
        codes = self.unpack(self.codes.part(begin, end).read(), shape[1])
        if form.kind == "fp8":
            check_codes(codes, self.codes)
        return QuantTensor(form, shape, codes.contiguous(), scales, minima)


def read_rows(stored: StoredTensor, rows: slice) -> Tensor:
    """Rows of what is stored for each row; of one number for all that one, as [1, 1]."""
    if torch.Size(stored.shape).numel() == 1:
        return stored.read().view(1, 1)
    part = stored.part(rows.start, rows.stop).read()
    return part.unsqueeze(1) if part.dim() == 1 else part


def unpack_halves(words: Tensor, columns: int) -> Tensor:
    """Words [M, W] with codes of 4 bits, the first in the lowest bits -> the same bytes, uint8 [M, ceil(K / 2)]."""
    return words.view(torch.uint8)[:, : -(-columns // 2)]


def unpack_bytes(words: Tensor, columns: int) -> Tensor:
    """Words [M, W] with codes 0 .. 255, the first in the lowest bits -> int8 [M, K], less 128."""
    return (words.view(torch.uint8)[:, :columns] ^ 0x80).view(torch.int8)


def as_stored(codes: Tensor, columns: int) -> Tensor:
    """Codes [M, K] that need no unpacking."""
    return codes


@dataclass(frozen=True)
class PackedTensor:
    """Rows `begin .. end` of a packed matrix as a source of weights."""

    packed: Packed
    begin: int
    end: int

    @classmethod
    def of(cls, packed: Packed) -> PackedTensor:
        return cls(packed, 0, packed.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.end - self.begin, self.packed.shape[1]

    @property
    def dtype(self) -> str:
        return self.packed.codes.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in the files."""
        return self.packed.codes.nbytes + self.packed.scales.nbytes

    @property
    def is_readable(self) -> bool:
        return True

    @property
    def format(self) -> QuantFormat | None:
        """None for rows that are not whole blocks."""
        return self.packed.form if self.begin % self.packed.form.rows == 0 else None

    @property
    def place(self) -> tuple[str, int]:
        return self.packed.codes.place

    def part(self, begin: int, end: int) -> PackedTensor:
        return replace(self, begin=self.begin + begin, end=self.begin + end)

    def quantized(self) -> QuantTensor:
        return self.packed.read(self.begin, self.end)

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        """Blocks of rows of about `PIECE_BYTES` in float32."""
        assert tuple(target.shape) == self.shape
        block = self.packed.form.rows
        step = max(1, PIECE_BYTES // (4 * block * self.shape[1])) * block
        for first in range(self.begin // block * block, self.end, step):
            begin, end = max(first, self.begin), min(first + step, self.end)
            yield partial(self._fill, target[begin - self.begin : end - self.begin], begin, end, first)

    def _fill(self, target: Tensor, begin: int, end: int, first: int) -> None:
        target.copy_(self.packed.read(first, end).dequantize()[begin - first :])
