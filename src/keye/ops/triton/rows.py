"""Reading rows of KV blocks inside kernels: `RowFormat.decode`, and where a token's row is.

Legend: N rows, D dims of a head. Kernels see a pool as flat memory of the number format (`Operand.values`), and the
scales of formats that have them as bfloat16 in the same memory (`Operand.scales`).
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat

#: Whether kernels run in Triton's interpreter, on tensors of the processor.
INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
PLAIN: Final = 0
FP8: Final = 1
INT8: Final = 2
INT4: Final = 3
_KINDS: Final = {"fp8": FP8, "int8": INT8, "int4": INT4}
_TL_DTYPES: Final = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Operand:
    """A pool of rows as kernels take it. `row` and `head` are strides in elements of `values`; `constants` are the
    compile-time arguments of `load_rows`."""

    format: RowFormat
    values: Tensor
    scales: Tensor

    @property
    def constants(self) -> tuple[int, int, int, int]:
        """KIND, ROW, HEAD and GROUP of `load_rows`."""
        size = self.values.element_size()
        return (
            _KINDS.get(self.format.kind, PLAIN),
            self.format.row_bytes // size,
            self.format.head_bytes // size,
            self.format.group,
        )


def operand(rows: BlockRows) -> Operand:
    """Views of a pool; nothing is copied."""
    assert rows.pool is not None
    pool, kind = rows.pool, rows.format.kind
    if rows.format.plain:
        values = pool.view(rows.format.dtype)
        return Operand(rows.format, values, values)
    return Operand(rows.format, pool.view(torch.int8) if kind == "int8" else pool, pool.view(torch.bfloat16))


def readable(rows: BlockRows, device: torch.device) -> bool:
    """Whether kernels can read these rows: one pool on the device, and a head that fits the tiles."""
    if rows.pool is None or rows.table is None or rows.pool.device != device:
        return False
    dim, head_bytes = rows.format.dim, rows.format.head_bytes
    return rows.pool.is_contiguous() and dim in (16, 32, 64, 128) and head_bytes % 2 == 0


def dot_dtype(q: Tensor, rows: RowFormat) -> tl.dtype:
    """What matrix products are computed in: the common type of queries and rows, else float32."""
    return _TL_DTYPES[q.dtype if rows.dtype == q.dtype else torch.float32]


# Inside kernels. Names in capitals are compile-time constants.


@triton.jit
def row_numbers(table, positions, keep, KV_BLOCK: tl.constexpr):
    """Row of the pool of each position, int64 [N]; `table` points at the first KV block of the sequence."""
    block = tl.load(table + positions // KV_BLOCK, mask=keep, other=0)
    return block.to(tl.int64) * KV_BLOCK + positions % KV_BLOCK


@triton.jit
def load_rows(
    values, scales, rows, keep, head,
    D: tl.constexpr, KIND: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Decodes one head of pool rows `rows` int64 [N] -> [N, D], zeros where not `keep`. Formats with scales come as
    bfloat16, as `RowFormat.decode` gives them; the others as they are stored."""
    dims = tl.arange(0, D)
    at = rows[:, None] * ROW + head * HEAD
    keep = keep[:, None]
    if KIND == 0:
        return tl.load(values + at + dims[None, :], mask=keep, other=0.0)
    else:
        first_scale = D
        if KIND == 3:
            inner = dims % GROUP
            byte = dims // GROUP * (GROUP // 2) + inner % (GROUP // 2)
            packed = tl.load(values + at + byte[None, :], mask=keep, other=0).to(tl.int32)
            half = tl.where(inner >= GROUP // 2, 4, 0)
            codes = (((packed >> half[None, :]) & 15) - 8).to(tl.float32)
            first_scale = D // 2
        elif KIND == 2:
            codes = tl.load(values + at + dims[None, :], mask=keep, other=0).to(tl.float32)
        else:
            codes = e4m3(tl.load(values + at + dims[None, :], mask=keep, other=0))
        scale_at = (at + first_scale) // 2 + (dims // GROUP)[None, :]
        scale = tl.load(scales + scale_at, mask=keep, other=0.0).to(tl.float32)
        return cast(codes * scale, tl.bfloat16, INTERPRETED)


@triton.jit
def e4m3(code):
    """float8 e4m3 bytes -> float32, by integer arithmetic: cards before compute capability 8.9 have no such type. The
    four bits of the exponent and three of the mantissa are put where float16 has the lowest of its own, which makes a
    number (also a denormal one) 2^-8 times as large. NaN, which `encode` writes for NaN only, reads as 480."""
    bits = code.to(tl.int32)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def cast(x, TO: tl.constexpr, INTERPRETED: tl.constexpr):
    """`x` rounded to a dtype as cards do it. Triton's interpreter cuts bits off on the way from float32 to bfloat16:
    there they are rounded before."""
    if INTERPRETED and (TO == tl.bfloat16 and x.dtype == tl.float32):
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TO)


@triton.jit
def product(a, b, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Matrix product in DOT, summed in float32. Triton's interpreter computes garbage for bfloat16 operands: there they
    are widened after rounding, which gives the same products."""
    a = cast(a, DOT, INTERPRETED)
    b = cast(b, DOT, INTERPRETED)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def launch_constants() -> dict[str, object]:
    """Compile-time arguments that every kernel over KV blocks takes."""
    return {"KV_BLOCK": KV_BLOCK, "INTERPRETED": INTERPRETED}
