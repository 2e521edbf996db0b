"""Hadamard transform and quantisation of indexer keys in one kernel: `reference.hadamard_transform` followed by
`RowFormat.encode`, with the bytes of that layout.

Not run on a card yet: only Triton's interpreter has executed this kernel. One difference to the reference is left: the
scale of fp8 is the power of two at or above amax / 448, exactly; the reference takes it from a rounded logarithm, which
can lie one step lower where amax / 448 exceeds a power of two by less than about a millionth.

Legend: N keys, I indexer dim.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.kv_blocks import RowFormat
from keye.ops.triton.rows import INTERPRETED, cast, hadamard

#: Keys that one program encodes.
BLOCK: Final = 16


@triton.jit
def _encode_kernel(
    x, codes, scales, count,
    D: tl.constexpr, STEPS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
    TRANSFORM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    keep = (row < count)[:, None]
    row = row.to(tl.int64)
    y = tl.load(x + row[:, None] * D + dims[None, :], mask=keep, other=0.0).to(tl.float32)
    if TRANSFORM:
        y = hadamard(y, BLOCK, D, STEPS) * D**-0.5
        y = cast(y, x.dtype.element_ty, INTERPRETED).to(
            tl.float32
        )  # the transform of the reference has the dtype of its input
    amax = tl.max(tl.abs(y), 1)
    if FP8:
        # The power of two at or above amax / 448: the exponent, and one more where there is a mantissa.
        bits = tl.div_rn(tl.maximum(amax, 1e-4), tl.full([BLOCK], 448.0, tl.float32)).to(tl.int32, bitcast=True)
        scale_bits = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.int32)
        scale = scale_bits.to(tl.float32, bitcast=True)
        code = _to_e4m3(tl.div_rn(y, tl.broadcast_to(scale[:, None], [BLOCK, D])))
    else:
        exact = tl.maximum(tl.div_rn(amax, tl.full([BLOCK], 127.0, tl.float32)), 1e-30)
        near = _nearest_bf16(exact)
        near = tl.where(near < exact, _nearest_bf16(near * (1 + 2**-7)), near)
        scale_bits = near.to(tl.int32, bitcast=True)
        z = tl.div_rn(y, tl.broadcast_to(near[:, None], [BLOCK, D]))
        code = _nearest(tl.minimum(tl.maximum(z, -127.0), 127.0))
    tl.store(codes + row[:, None] * ROW + dims[None, :], (code & 0xFF).to(tl.uint8), mask=keep)
    tl.store(scales + (row * ROW + D) // 2, (scale_bits >> 16).to(tl.int16), mask=row < count)


@triton.jit
def _nearest_bf16(x):
    """float32 -> the nearest value of bfloat16, even ones among two, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(x):
    """float32 within +-2^22 -> the nearest int32, even ones among two: a large number leaves no room for fractions."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _to_e4m3(x):
    """float32 -> float8 e4m3 codes in int32, to the nearest, even ones among two; magnitudes are held at 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    size_bits = size.to(tl.int32, bitcast=True)
    # Above 2^-6: 20 bits of the mantissa go, and the exponent counts from 120 less. Below: multiples of 2^-9.
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    small = _nearest(tl.minimum(size, 1.0) * 512.0)
    return tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 0x80)


def encode_indexer_keys(keys: Tensor, rows: RowFormat, *, transform: bool) -> Tensor:
    """Keys of any floating dtype [N, I] -> uint8 [N, row_bytes] in a format `fp8` or `int8` of one head; Hadamard
    transformed first if `transform`. I is a power of two."""
    assert rows.heads == 1 and rows.kind in ("fp8", "int8") and keys.shape[1] == rows.dim
    count, dim = keys.shape
    out = torch.empty(count, rows.row_bytes, dtype=torch.uint8, device=keys.device)
    if count:
        _encode_kernel[(triton.cdiv(count, BLOCK),)](
            keys.contiguous(), out, out.view(torch.int16), count, D=dim, STEPS=dim.bit_length() - 1,
            ROW=rows.row_bytes, BLOCK=BLOCK, FP8=rows.kind == "fp8", TRANSFORM=transform,
            INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return out
