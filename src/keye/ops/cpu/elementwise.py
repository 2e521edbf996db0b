"""Norms of rows, and what follows them, by the compiled core: one call where torch takes a dozen, which is what counts
when a step is one token.

The definitions are in `keye.ops.elementwise`; results differ from them in the last bit at most.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Final

import torch
from torch import Tensor

from keye.ops.elementwise import PLAIN, Elementwise

_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MULTIPLE: Final = 32


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "x", "delta", "weight", "bias", "cos", "sin", "out", "sum", "rows", "heads", "dim", "stride")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "is_centred", "has_hadamard", "threads")),
    )  # fmt: skip


def make(library: ctypes.CDLL) -> Elementwise:
    """The operations by a library where it takes their operands, else the plain ones. They have no backward pass:
    gradients take the plain ones."""
    return PLAIN._replace(
        rms_norm=partial(_rms_norm, library), add_rms_norm=partial(_add_rms_norm, library),
        norm_rotate=partial(_norm_rotate, library), index_query=partial(_index_query, library),
        index_key=partial(_index_key, library),
    )  # fmt: skip


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype in _DTYPES and weight.dtype in _DTYPES and x.shape[-1] % _MULTIPLE == 0 and x.device.type == "cpu"
        and x.numel() > 0 and not torch.is_grad_enabled()
    )  # fmt: skip


def _rms_norm(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _takes(x, weight):
        return PLAIN.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    dim = x.shape[-1]
    _run(library, _Norm(x.data_ptr(), 0, weight.data_ptr(), 0, 0, 0, out.data_ptr(), 0, x.numel() // dim, 1, dim, dim,
                        eps, _DTYPES[x.dtype], _DTYPES[weight.dtype], 0, 0, torch.get_num_threads()))  # fmt: skip
    return out


def _add_rms_norm(library: ctypes.CDLL, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _takes(x, weight) or delta.dtype != x.dtype or delta.shape != x.shape:
        return PLAIN.add_rms_norm(x, delta, weight, eps)
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    dim = x.shape[-1]
    _run(library, _Norm(x.data_ptr(), delta.data_ptr(), weight.data_ptr(), 0, 0, 0, out.data_ptr(), total.data_ptr(),
                        x.numel() // dim, 1, dim, dim, eps, _DTYPES[x.dtype], _DTYPES[weight.dtype], 0, 0,
                        torch.get_num_threads()))  # fmt: skip
    return total, out


def _norm_rotate(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    if not _takes(x, weight):
        return PLAIN.norm_rotate(x, weight, eps, cos, sin)
    return _rotated(library, x, weight, None, eps, cos, sin, has_hadamard=False)


def _index_query(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    if not _takes(x, weight):
        return PLAIN.index_query(x, weight, eps, cos, sin)
    return _rotated(library, x, weight, None, eps, cos, sin, has_hadamard=True)


def _index_key(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    if not _takes(x, weight) or bias.dtype != weight.dtype:
        return PLAIN.index_key(x, weight, bias, eps, cos, sin)
    return _rotated(library, x, weight, bias, eps, cos, sin, has_hadamard=True)


def _rotated(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, cos: Tensor, sin: Tensor, *,
    has_hadamard: bool,
) -> Tensor:  # fmt: skip
    """`x` [N, heads, D], whose rows may be parts of longer ones."""
    rows, heads, dim = x.shape
    if x.stride()[1:] != (dim, 1):
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    _run(library, _Norm(x.data_ptr(), 0, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), cos.data_ptr(),
                        sin.data_ptr(), out.data_ptr(), 0, rows, heads, dim, x.stride(0), eps, _DTYPES[x.dtype],
                        _DTYPES[weight.dtype], bias is not None, has_hadamard, torch.get_num_threads()))  # fmt: skip
    return out


def _run(library: ctypes.CDLL, call: _Norm) -> None:
    if library.keye_norm(ctypes.byref(call)):
        raise MemoryError("the compiled core found no memory for its scratch")
