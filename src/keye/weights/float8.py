"""Float8 weights with a scale for each block, as DeepSeek-V3's files have them: `X` in e4m3 beside `X_scale_inv`.

A number is code * scale, for the scale of its block; the last block of a row or column may be short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from keye.ops.quantized import QuantFormat, QuantTensor
from keye.weights.safetensors import PIECE_BYTES, StoredTensor
from keye.weights.source import TensorSource, WeightsError

SCALE_SUFFIX = "_scale_inv"
FLOAT8 = "F8_E4M3"


@dataclass(frozen=True)
class Float8Tensor:
    """Rows `begin .. end` of a float8 matrix of a file, or matrices of a stack, with their scales; `blocks` says which
    numbers share one."""

    codes: StoredTensor
    scales: StoredTensor
    blocks: QuantFormat
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.begin, *self.codes.shape[1:])

    @property
    def dtype(self) -> str:
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def is_readable(self) -> bool:
        return True

    @property
    def format(self) -> QuantFormat | None:
        """None for rows that are not whole blocks, and for a stack: fused experts lie the other way round."""
        return self.blocks if len(self.shape) == 2 and self.begin % self.blocks.rows == 0 else None

    @property
    def place(self) -> tuple[str, int]:
        return self.codes.place

    def part(self, begin: int, end: int) -> Float8Tensor:
        return replace(self, begin=self.begin + begin, end=self.begin + end)

    def quantized(self) -> QuantTensor:
        return self._read(self.begin, self.end)

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        """Blocks of rows of about `PIECE_BYTES` in float32; of a stack one matrix each."""
        assert target.shape == self.shape
        block = 1 if len(self.shape) > 2 else self.blocks.rows
        step = max(1, PIECE_BYTES // (4 * block * (self.codes.nbytes // self.codes.shape[0]))) * block
        for first in range(self.begin // block * block, self.end, step):
            begin, end = max(first, self.begin), min(first + step, self.end)
            yield partial(self._fill, target[begin - self.begin : end - self.begin], begin, end, first)

    def _fill(self, target: Tensor, begin: int, end: int, first: int) -> None:
        target.copy_(self._read(first, end).dequantize()[begin - first :])

    def _read(self, begin: int, end: int) -> QuantTensor:
        """Rows from the beginning of a block on, or matrices of a stack."""
        rows = 1 if len(self.shape) > 2 else self.blocks.rows
        scales = self.scales.part(begin // rows, -(-end // rows)).read().float()
        if not scales.isfinite().all():
            raise WeightsError(f"{self.scales.name} holds numbers that are not finite; fetch {self.scales.file} again")
        codes = self.codes.part(begin, end)
        return QuantTensor(self.blocks, codes.shape, check_codes(codes.read(), self.codes), scales)


def check_codes(codes: Tensor, stored: StoredTensor) -> Tensor:
    """Float8 codes as they are; `WeightsError` where one is not a number. e4m3 has no infinities."""
    if bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise WeightsError(f"{stored.name} holds numbers that are not finite; fetch {stored.file} again")
    return codes


def join_scales(tensors: Mapping[str, StoredTensor], block: tuple[int, int]) -> dict[str, TensorSource]:
    """The tensors of a checkpoint with every float8 one and its scales as one; `block` (rows, columns) is what
    config.json says of them. Float8 without scales stays as it is. `WeightsError` for scales of another shape."""
    form = QuantFormat("fp8", block[1], rows=block[0], scale_dtype=torch.float32)
    joined: dict[str, TensorSource] = dict(tensors)
    for name, tensor in tensors.items():
        scales = tensors.get(name + SCALE_SUFFIX)
        if tensor.dtype != FLOAT8 or scales is None or not scales.is_readable:
            continue
        if len(tensor.shape) < 2 or scales.shape != form.scale_shape(tensor.shape):
            raise WeightsError(f"{scales.name} is {list(scales.shape)}, which does not fit {name} {list(tensor.shape)} "
                               f"in blocks of {block[0]} x {block[1]}")  # fmt: skip
        joined[name] = Float8Tensor(tensor, scales, form, 0, tensor.shape[0])
        del joined[scales.name]
    return joined
