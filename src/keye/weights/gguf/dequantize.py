"""Blocks of ggml's number formats to float32, bit for bit as ggml and the gguf package compute them.

Every function takes bytes uint8 [n, nbytes], one block a row, and returns its codes and scales: `value = scale * code`
or `scale * code - minimum` in float32, for runs of `block / groups` numbers each. The layouts are those of ggml-quants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.weights.gguf.types import TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """n blocks as integers: `codes` int8 or uint8 [n, groups, size], `scales` and `minima` float32 [n, groups]."""

    codes: NDArray[np.int8] | Bytes
    scales: Floats
    minima: Floats | None = None

    def to_float(self) -> Floats:
        """float32 [n, groups, size]."""
        values = self.codes.astype(np.float32)
        values *= self.scales[..., None]
        if self.minima is not None:
            values -= self.minima[..., None]
        return values


def _half(part: Bytes) -> Floats:
    """float16 numbers in the bytes [n, 2 * k] -> float32 [n, k]."""
    return np.ascontiguousarray(part).view("<f2").astype(np.float32)


def _fields(part: Bytes, bits: int, width: int) -> Bytes:
    """Runs of `width` bytes hold `8 / bits` numbers each, the first ones in the lowest bits: [n, k] -> [n, k * 8 /
    bits] in the order of the numbers."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    mask = np.uint8((1 << bits) - 1)
    return ((part.reshape(len(part), -1, 1, width) >> shifts) & mask).reshape(len(part), -1)


def _pairs(part: Bytes, width: int) -> Bytes:
    """The same for 4 bits as keye stores them: byte j holds numbers 2j (low half) and 2j + 1: [n, k] -> [n, k]."""
    runs = part.reshape(len(part), -1, width)
    even, odd = runs[..., ::2], runs[..., 1::2]
    out = np.empty((len(part), runs.shape[1], 2, width // 2), np.uint8)
    np.bitwise_or(even & np.uint8(15), odd << np.uint8(4), out=out[:, :, 0])
    np.bitwise_or(even >> np.uint8(4), odd & np.uint8(240), out=out[:, :, 1])
    return out.reshape(len(part), -1)


def _q4_0(b: Bytes) -> Codes:
    codes = _fields(b[:, 2:], 4, 16).view(np.int8) - np.int8(8)
    return Codes(codes.reshape(len(b), 1, 32), _half(b[:, :2]))


def _q4_1(b: Bytes) -> Codes:
    return Codes(_fields(b[:, 4:], 4, 16).reshape(len(b), 1, 32), _half(b[:, :2]), -_half(b[:, 2:4]))


def _fifth_bits(part: Bytes) -> Bytes:
    """The highest bits of 32 numbers, one bit each in order: [n, 4] -> [n, 32], at their place."""
    return np.unpackbits(part, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(b: Bytes) -> Codes:
    codes = (_fields(b[:, 6:], 4, 16) | _fifth_bits(b[:, 2:6])).view(np.int8) - np.int8(16)
    return Codes(codes.reshape(len(b), 1, 32), _half(b[:, :2]))


def _q5_1(b: Bytes) -> Codes:
    codes = _fields(b[:, 8:], 4, 16) | _fifth_bits(b[:, 4:8])
    return Codes(codes.reshape(len(b), 1, 32), _half(b[:, :2]), -_half(b[:, 2:4]))


def _q8_0(b: Bytes) -> Codes:
    return Codes(b[:, 2:].view(np.int8).reshape(len(b), 1, 32), _half(b[:, :2]))


def _q2_k(b: Bytes) -> Codes:
    scales, d, least = b[:, :16], _half(b[:, 80:82]), _half(b[:, 82:84])
    codes = _fields(b[:, 16:80], 2, 32).reshape(len(b), 16, 16)
    return Codes(codes, d * (scales & 15).astype(np.float32), least * (scales >> 4).astype(np.float32))


def _q3_k(b: Bytes) -> Codes:
    low, high = _fields(b[:, 96:104], 4, 8), _fields(b[:, 104:108], 2, 4)
    scales = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    third = _fields(b[:, :32], 1, 32) ^ np.uint8(1)  # a bit that is set stands for no offset
    codes = _fields(b[:, 32:96], 2, 32).view(np.int8) - (third << np.uint8(2)).view(np.int8)
    return Codes(codes.reshape(len(b), 16, 16), _half(b[:, 108:110]) * scales.astype(np.float32))


def _six_bit_pairs(part: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of 6 bits in 12 bytes [n, 12] -> float32 [n, 8] each."""
    first, second, rest = part[:, :4], part[:, 4:8], part[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=-1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=-1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_scales(b: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of Q4_K and Q5_K blocks."""
    scales, minima = _six_bit_pairs(b[:, 4:16])
    return _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima


def _q4_k(b: Bytes) -> Codes:
    return Codes(_fields(b[:, 16:], 4, 32).reshape(len(b), 8, 32), *_k_scales(b))


def _q5_k(b: Bytes) -> Codes:
    codes = _fields(b[:, 48:], 4, 32) | (_fields(b[:, 16:48], 1, 32) << np.uint8(4))
    return Codes(codes.reshape(len(b), 8, 32), *_k_scales(b))


def _q6_k(b: Bytes) -> Codes:
    codes = (_fields(b[:, :128], 4, 64) | (_fields(b[:, 128:192], 2, 32) << np.uint8(4))).view(np.int8) - np.int8(32)
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return Codes(codes.reshape(len(b), 16, 16), _half(b[:, 208:210]) * scales)


def _q8_k(b: Bytes) -> Codes:
    scales = np.ascontiguousarray(b[:, :4]).view("<f4")
    return Codes(b[:, 4:260].view(np.int8).reshape(len(b), 1, 256), scales)


_CODES: Final[dict[str, Callable[[Bytes], Codes]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "Q8_K": _q8_k,
}  # fmt: skip


#: Types of 4 bits whose numbers are stored as `_pairs` makes them: where they begin, and the width of a run.
_PAIRED: Final = {"Q4_0": (2, 16), "Q4_1": (4, 16), "Q4_K": (16, 32)}
_SCALES: Final[dict[str, Callable[[Bytes], tuple[Floats, Floats | None]]]] = {
    "Q4_0": lambda b: (_half(b[:, :2]), None), "Q4_1": lambda b: (_half(b[:, :2]), -_half(b[:, 2:4])),
    "Q4_K": _k_scales,
}  # fmt: skip


def unpack_pairs(kind: TensorType, data: Bytes) -> Codes | None:
    """Like `unpack` with two codes in a byte, uint8 [n, groups, size / 2]; of signed codes c it holds c + 8. None for a
    type that is not of 4 bits."""
    if kind.name not in _PAIRED:
        return None
    blocks, (begin, width) = data.reshape(-1, kind.nbytes), _PAIRED[kind.name]
    scales, minima = _SCALES[kind.name](blocks)
    codes = _pairs(blocks[:, begin:], width).reshape(len(blocks), scales.shape[1], -1)
    return Codes(codes, scales, minima)


def has_codes(kind: TensorType) -> bool:
    """Whether numbers of this type are integers with scales."""
    return kind.name in _CODES


def unpack(kind: TensorType, data: Bytes) -> Codes:
    """Whole blocks of a type that `has_codes`, uint8 [n * nbytes] -> codes and scales."""
    return _CODES[kind.name](data.reshape(-1, kind.nbytes))


def dequantize(kind: TensorType, data: Bytes) -> Floats:
    """Whole blocks of a readable type, uint8 [n * nbytes] -> float32 [n * block]."""
    if has_codes(kind):
        return unpack(kind, data).to_float().reshape(-1)
    if kind.name == "BF16":
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[kind.name]).astype(np.float32, copy=False)
