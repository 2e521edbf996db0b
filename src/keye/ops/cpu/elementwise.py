"""Norms of rows, and what follows them, by the compiled core: one call where torch takes a dozen, which is what counts
when a step is one token.

The definitions are in `keye.ops.elementwise`; results differ from them in the last bit at most. Where a gradient is
asked for, results are the same and the backward pass is that of the definition, which it computes again: a model in
training has the numbers that it has in inference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    """The operations by a library where it takes their operands, else the plain ones."""
    fast: dict[str, Callable[..., Any]] = {
        "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "norm_rotate": _norm_rotate,
        "index_query": _index_query, "index_key": _index_key,
    }  # fmt: skip
    return PLAIN._replace(
        **{name: partial(_differentiate, partial(f, library), getattr(PLAIN, name)) for name, f in fast.items()}
    )


def _differentiate(fast: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Any:
    """`fast(*inputs)`, with the gradients of `plain`."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return _Recomputed.apply(fast, plain, *inputs)
    with torch.no_grad():
        return fast(*inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Any], plain: Callable[..., Any], *inputs: Any) -> Any:
        ctx.plain = plain
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        return fast(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        inputs = [
            other if x is None else x.detach().requires_grad_(need)
            for x, other, need in zip(ctx.saved_tensors, ctx.others, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad():
            out = ctx.plain(*inputs)
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, upstream))
        return None, None, *(next(gradients) if need else None for need in ctx.needs_input_grad[2:])


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype in _DTYPES and weight.dtype in _DTYPES and x.shape[-1] % _MULTIPLE == 0 and x.device.type == "cpu"
        and x.numel() > 0
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
