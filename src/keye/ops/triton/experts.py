"""Products of rows, sorted by expert, with the weights of their experts, in one launch.

Not run on a card yet: only Triton's interpreter has executed this kernel.

Legend: N rows, E experts, K inner dimension, M outputs.
"""

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from keye.ops.triton.layout import tuned
from keye.ops.triton.rows import INTERPRETED, cast, product

#: Rows of a tile, few in small steps (decoding), and outputs and inner dimensions of one.
ROW_TILES: Final = (16, 64)
COLUMN_TILE: Final = 64
INNER_TILE: Final = 64


@triton.jit
def _grouped_kernel(
    x, weights, out, expert_of, begin_of, stop_of, inner, outputs, expert_step, inner_step, output_step,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of rows begin .. stop of one expert, BN outputs."""
    tile = tl.program_id(0)
    expert = tl.load(expert_of + tile).to(tl.int64)
    row = tl.load(begin_of + tile) + tl.arange(0, BM)
    keep = row < tl.load(stop_of + tile)
    row = row.to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < outputs
    sums = tl.zeros([BM, BN], tl.float32)
    for k in range(0, inner, BK):
        dims = k + tl.arange(0, BK)
        real = dims < inner
        a = tl.load(x + row[:, None] * inner + dims[None, :], mask=keep[:, None] & real[None, :], other=0.0)
        at = expert * expert_step + dims.to(tl.int64)[:, None] * inner_step + column[None, :] * output_step
        b = tl.load(weights + at, mask=real[:, None] & inside[None, :], other=0.0)
        sums += product(a, b, x.dtype.element_ty, INTERPRETED)
    at = row[:, None] * outputs + column[None, :]
    tl.store(out + at, cast(sums, out.dtype.element_ty, INTERPRETED), mask=keep[:, None] & inside[None, :])


_tuned_grouped: Final = tuned(_grouped_kernel, ["BM", "inner", "outputs"], [(4, 2), (4, 3), (4, 4), (8, 3)])


def grouped_matmul(x: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """`x` [N, K] sorted by expert, `weights` [E, K, M] of the same dtype, `sizes` rows of each expert -> [N, M]."""
    (count, inner), outputs = x.shape, weights.shape[2]
    out = x.new_empty(count, outputs)
    if not count:
        return out
    rows = ROW_TILES[1] if count >= len(sizes) * ROW_TILES[0] else ROW_TILES[0]
    assert sum(sizes) == count, "sizes must add up to the rows"
    expert_of, begin_of, stop_of = tiles_of(sizes, rows, x.device)
    _tuned_grouped[(len(expert_of), triton.cdiv(outputs, COLUMN_TILE))](
        x.contiguous(), weights, out, expert_of, begin_of, stop_of, inner, outputs, *weights.stride(),
        BM=rows, BN=COLUMN_TILE, BK=INNER_TILE, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    return out


def tiles_of(sizes: Sequence[int], rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Cuts the rows of each expert into tiles: expert, first row, and end of the expert's rows, each int32 [tiles]."""
    tiles, begin = [], 0
    for expert, size in enumerate(sizes):
        stop = begin + size
        tiles += [(expert, at, stop) for at in range(begin, stop, rows)]
        begin = stop
    return torch.tensor(tiles, dtype=torch.int32, device="cpu").t().contiguous().to(device).unbind(0)
