"""Weights to the block formats of GGUF: scales that are searched for the smallest squared error, packed as ggml does.

Each format is a few blocks of bytes behind one another; K formats have 256 numbers with a scale of 6 or 8 bits for
each 16 or 32 of them. Knows rows of numbers and bytes; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from keye.ops.cpu.scales import encode, search_affine, search_symmetric
from keye.weights.gguf.types import BY_NAME

#: Largest number that half precision holds.
HALF_MAX: Final = 65504.0


def quantize(values: Tensor, kind: str) -> Tensor:
    """float [rows, columns] as uint8 [rows, bytes of a row]; `columns` must be a multiple of the numbers of a block."""
    block = BY_NAME[kind].block
    rows, columns = values.shape
    assert columns % block == 0, f"rows of {columns} are not blocks of {block}"
    return FORMATS[kind](values.float().reshape(-1, block)).view(rows, -1)


def _q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = x * torch.where(scale != 0, 1 / scale, 0)
    codes = torch.where(codes < 0, (codes - 0.5).ceil(), (codes + 0.5).floor())  # ties away from zero, as ggml rounds
    return torch.cat((_half(scale), codes.to(torch.int8).view(torch.uint8)), 1)


def _q4_0(x: Tensor) -> Tensor:
    scale = _searched_half(x, -8, 7)
    codes = encode(x, _float(scale), None, -8, 7)
    return torch.cat((scale, codes[:, :16] | codes[:, 16:] << 4), 1)


def _q5_0(x: Tensor) -> Tensor:
    scale = _searched_half(x, -16, 15)
    return torch.cat((scale, *_fifth_bits(encode(x, _float(scale), None, -16, 15))), 1)


def _q5_1(x: Tensor) -> Tensor:
    searched = search_affine(x, 31)
    assert searched.minimum is not None
    scale, minimum = _half(searched.scale[:, None]), _half(searched.minimum[:, None])
    return torch.cat((scale, minimum, *_fifth_bits(encode(x, _float(scale), _float(minimum), 0, 31))), 1)


def _q4_k(x: Tensor) -> Tensor:
    head, codes = _affine_super_block(x, 15)
    pairs = codes.view(-1, 4, 2, 32)
    return torch.cat((head, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)), 1)


def _q5_k(x: Tensor) -> Tensor:
    head, codes = _affine_super_block(x, 31)
    pairs = (codes & 15).view(-1, 4, 2, 32)
    high = _join_bits((codes >> 4).view(-1, 8, 32), 1)
    return torch.cat((head, high, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)), 1)


def _q6_k(x: Tensor) -> Tensor:
    scale, codes, top = _symmetric_super_block(x, -32, 31, -128, 127)
    quarters = codes.view(-1, 2, 4, 32)
    low, high = quarters & 15, quarters >> 4
    nibbles = low[:, :, :2] | low[:, :, 2:] << 4
    return torch.cat(
        (nibbles.flatten(1), _join_bits(high.flatten(0, 1), 2).view(-1, 64), scale.view(torch.uint8), top), 1
    )


def _q3_k(x: Tensor) -> Tensor:
    scale, codes, top = _symmetric_super_block(x, -4, 3, -32, 31)
    high = _join_bits((codes >> 2).view(-1, 8, 32), 1)
    low = _join_bits((codes & 3).view(-1, 4, 32), 2).view(-1, 64)
    six = (scale + 32).to(torch.uint8)
    scales = torch.cat((six[:, :8] & 15 | (six[:, 8:] & 15) << 4, _join_bits((six >> 4).view(-1, 4, 4), 2)), 1)
    return torch.cat((high, low, scales, top), 1)


def _symmetric_super_block(x: Tensor, low: int, high: int, least: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 scales [B, 16] in least .. most, codes [B, 256], and the scale of the scales as two bytes."""
    groups = x.view(-1, 16)
    scale = search_symmetric(groups, low, high).scale.view(-1, 16)
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    top = _half(peak / least)
    unit = _float(top)[:, None]
    steps = torch.where(unit != 0, scale / unit, 0).round().clamp(least, most)
    codes = encode(groups, (steps * unit).view(-1), None, low, high)
    return steps.to(torch.int8), codes.view(-1, 256), top


def _affine_super_block(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of a block, which hold 8 scales and minima of 6 bits and their units, and codes [B, 256]."""
    groups = x.view(-1, 32)
    searched = search_affine(groups, levels)
    assert searched.minimum is not None
    scale, minimum = searched.scale.view(-1, 8), -searched.minimum.view(-1, 8)
    tops = [_half(value.amax(1, keepdim=True) / 63) for value in (scale, minimum)]
    units = [_float(top)[:, None] for top in tops]
    steps = [torch.where(unit > 0, value / unit, 0).round().clamp(0, 63)
             for unit, value in zip(units, (scale, minimum), strict=True)]  # fmt: skip
    codes = encode(groups, (steps[0] * units[0]).view(-1), -(steps[1] * units[1]).view(-1), 0, levels)
    s, m = (value.to(torch.uint8) for value in steps)
    packed = (s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4)
    return torch.cat((*tops, *packed), 1), codes.view(-1, 256)


def _join_bits(fields: Tensor, bits: int) -> Tensor:
    """uint8 [B, fields, n] to [B, n]: field i begins at bit i * bits."""
    joined = fields[:, 0].clone()
    for i in range(1, fields.shape[1]):
        joined |= fields[:, i] << i * bits
    return joined


def _fifth_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, 32] of five bits: the fifth bits as four bytes, and the others in sixteen."""
    high = _join_bits((codes >> 4).view(-1, 4, 8).transpose(1, 2), 1)
    low = codes & 15
    return high, low[:, :16] | low[:, 16:] << 4


def _searched_half(x: Tensor, low: int, high: int) -> Tensor:
    return _half(search_symmetric(x, low, high).scale[:, None])


def _half(value: Tensor) -> Tensor:
    """Float [B, 1] as the two bytes of its half-precision number."""
    return value.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).view(torch.uint8)


def _float(half: Tensor) -> Tensor:
    return half.view(torch.float16).float().view(-1)


#: Formats that are written: float32 [blocks, numbers of a block] -> uint8 [blocks, bytes of a block].
FORMATS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip
