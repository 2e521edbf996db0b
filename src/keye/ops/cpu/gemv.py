"""Products of few rows with large bfloat16 matrices, as in decoding, by the compiled core.

torch reads such a matrix with less than half of what the memory gives; `native/gemv.h` with nearly all of it. The
definitions are `torch.nn.functional.linear` and the loop over experts in `keye.models.moe`; results differ from them in
the last bit at most where sums are rounded otherwise.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

#: Rows up to which reading the matrix is what takes the time; columns and numbers from which it is worth a call.
MOST_ROWS: Final = 8
LEAST_COLUMNS, LEAST_NUMBERS = 1024, 1 << 17
#: Numbers of an expert's larger matrix from which it is, and rows that each expert has at most on average.
LEAST_EXPERT_NUMBERS, MOST_EXPERT_ROWS = 1 << 19, 4
_LINE_NUMBERS: Final = 32
_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 2}


class _Linear(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("x", "weight", "bias", "out", "rows", "columns", "outputs", "threads", "out_dtype")
    )


class _Experts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in (
            "x", "gate_up", "down", "chosen", "weights", "out", "gate_up_bytes", "down_bytes", "experts", "tokens",
            "top_k", "width", "inner", "threads")
    )  # fmt: skip


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` can multiply these, and is faster than torch. It has no backward pass."""
    columns = weight.shape[1]
    return (
        x.shape[-1] == columns and 0 < x.numel() <= MOST_ROWS * columns
        and weight.numel() >= LEAST_NUMBERS and columns >= LEAST_COLUMNS
        and columns % _LINE_NUMBERS == 0
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.is_contiguous() and x.device.type == weight.device.type == "cpu" and not torch.is_grad_enabled()
    )  # fmt: skip


def linear(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`x` [..., K] times `weight` [M, K] transposed, plus `bias` [M]: [..., M] in `dtype`, bfloat16 or float32."""
    outputs, columns = weight.shape
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    call = _Linear(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), x.numel() // columns,
        columns, outputs, torch.get_num_threads(), _DTYPES[dtype],
    )  # fmt: skip
    _run(library.keye_linear, call)
    return out


def takes_experts(x: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `mix_experts` can compute these, and is faster than torch. It has no backward pass."""
    count, width, outputs = gate_up.shape
    return (
        x.shape[1] == width and 0 < chosen.numel() <= max(MOST_EXPERT_ROWS * count, MOST_ROWS * chosen.shape[1])
        and width * outputs >= LEAST_EXPERT_NUMBERS and not width % _LINE_NUMBERS and not outputs % (2 * _LINE_NUMBERS)
        and x.dtype == gate_up.dtype == down.dtype == torch.bfloat16 and x.device.type == gate_up.device.type == "cpu"
        and gate_up.mT.is_contiguous() and down.mT.is_contiguous() and not torch.is_grad_enabled()
    )  # fmt: skip


def mix_experts(
    library: ctypes.CDLL, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Every token `x` [T, d] through its `chosen` experts int64 [T, K], their outputs summed with `weights` [T, K].

    `gate_up` [E, d, 2I] and `down` [E, I, d] have their inner dimension contiguous in memory.
    """
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.float().contiguous()
    out = torch.empty_like(x)
    (count, width, outputs), (tokens, top_k) = gate_up.shape, chosen.shape
    call = _Experts(
        x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), chosen.data_ptr(), weights.data_ptr(), out.data_ptr(),
        2 * gate_up.stride(0), 2 * down.stride(0), count, tokens, top_k, width, outputs // 2, torch.get_num_threads(),
    )  # fmt: skip
    _run(library.keye_mix_experts, call)
    return out


def _run(function: ctypes._NamedFuncPointer, call: ctypes.Structure) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("the compiled core found no memory for its scratch")
