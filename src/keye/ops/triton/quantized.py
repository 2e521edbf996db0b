"""Products of rows with quantised weights, which are de-quantised tile by tile into the dtype of the rows: int4, int8
and fp8, one matrix or one for each expert.

Not run on a card yet: only Triton's interpreter has executed this kernel.

Legend: N rows, E experts, K inputs, M outputs, G groups of inputs.
"""

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.quantized import QuantTensor
from keye.ops.triton.experts import COLUMN_TILE, INNER_TILE, ROW_TILES, tiles_of
from keye.ops.triton.layout import tuned
from keye.ops.triton.rows import INTERPRETED, cast, e4m3, product

_KINDS: Final = {"int4": 4, "int8": 8, "fp8": 1}


@triton.jit
def _quantized_kernel(
    x, codes, scales, minima, out, expert_of, begin_of, stop_of, inner, outputs, code_row, scale_row, scale_rows, group,
    shared_rows, KIND: tl.constexpr, HAS_MINIMUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of rows begin .. stop of one expert, BN outputs. `code_row` bytes hold the codes of an output, and
    `scale_row` scales belong to `shared_rows` outputs, of which an expert has `scale_rows`."""
    tile = tl.program_id(0)
    expert = tl.load(expert_of + tile).to(tl.int64)
    row = tl.load(begin_of + tile) + tl.arange(0, BM)
    keep = row < tl.load(stop_of + tile)
    row = row.to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < outputs
    code_at = (expert * outputs + column) * code_row
    scale_at = (expert * scale_rows + column // shared_rows) * scale_row
    sums = tl.zeros([BM, BN], tl.float32)
    for k in range(0, inner, BK):
        dims = k + tl.arange(0, BK)
        real = dims < inner
        a = tl.load(x + row[:, None] * inner + dims[None, :], mask=keep[:, None] & real[None, :], other=0.0)
        wanted = real[:, None] & inside[None, :]
        if KIND == 4:
            byte = tl.load(codes + code_at[None, :] + (dims // 2)[:, None], mask=wanted, other=0).to(tl.int32)
            half = (byte >> ((dims % 2) * 4)[:, None]) & 15
            b = (half if HAS_MINIMUM else half - 8).to(tl.float32)
        elif KIND == 8:
            b = tl.load(codes + code_at[None, :] + dims[:, None], mask=wanted, other=0).to(tl.float32)
        else:
            b = e4m3(tl.load(codes + code_at[None, :] + dims[:, None], mask=wanted, other=0))
        at = scale_at[None, :] + (dims // group)[:, None]
        b = b * tl.load(scales + at, mask=wanted, other=0.0).to(tl.float32)
        if HAS_MINIMUM:
            b += tl.load(minima + at, mask=wanted, other=0.0).to(tl.float32)
        sums += product(a, b, x.dtype.element_ty, INTERPRETED)
    at = row[:, None] * outputs + column[None, :]
    tl.store(out + at, cast(sums, out.dtype.element_ty, INTERPRETED), mask=keep[:, None] & inside[None, :])


_tuned_quantized: Final = tuned(_quantized_kernel, ["BM", "inner", "outputs", "KIND"], [(4, 2), (4, 3), (4, 4), (8, 3)])


def multiply(x_NK: Tensor, weight: QuantTensor, sizes: Sequence[int] | None = None) -> Tensor:
    """`x` @ weight.T -> [N, M] in the dtype of `x`. With `sizes` the rows are sorted by expert, and the weight is
    [E, M, K]."""
    form, (outputs, inner) = weight.format, weight.shape[-2:]
    out = x_NK.new_empty(x_NK.shape[0], outputs)
    if not x_NK.shape[0]:
        return out
    if sizes is None:
        sizes = [x_NK.shape[0]]
    rows = ROW_TILES[1] if x_NK.shape[0] >= len(sizes) * ROW_TILES[0] else ROW_TILES[0]
    expert_of, begin_of, stop_of = tiles_of(sizes, rows, x_NK.device)
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    minima = scales if weight.minima is None else weight.minima.contiguous()
    _tuned_quantized[(len(expert_of), triton.cdiv(outputs, COLUMN_TILE))](
        x_NK.contiguous(), codes.view(torch.int8) if form.kind == "int8" else codes.view(torch.uint8), scales, minima,
        out, expert_of, begin_of, stop_of, inner, outputs, codes.shape[-1], scales.shape[-1], scales.shape[-2],
        form.group or inner, form.rows, KIND=_KINDS[form.kind], HAS_MINIMUM=form.has_minimum, BM=rows, BN=COLUMN_TILE,
        BK=INNER_TILE, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    return out
