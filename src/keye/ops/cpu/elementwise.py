"""Norms of rows, and what follows them, by the compiled core: one call where torch takes a dozen, which is what counts
when a step is one token.

The definitions are in `keye.ops.elementwise`; results differ from them in the last bit at most. Where a gradient is
asked for, results are the same: a model in training has the numbers that it has in inference.
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


class _NormBackward(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "x", "weight", "grad", "grad_sum", "cos", "sin", "grad_x", "grad_weight", "grad_bias", "rows", "heads",
            "dim", "stride")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "is_centred", "has_hadamard", "threads")),
    )  # fmt: skip


class _SwigluBackward(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("gate_up", "grad", "grad_gate_up", "rows", "inner")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    )


def make(library: ctypes.CDLL, *, forward: bool = True) -> Elementwise:
    """The operations by a library where it takes their operands, else the plain ones. Without `forward` it computes
    their gradients only, and results are those of the plain ones to the last bit."""
    fast: dict[str, Callable[..., Any]] = {
        "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "norm_rotate": _norm_rotate,
        "index_query": _index_query, "index_key": _index_key,
    }  # fmt: skip
    swiglu = partial(_swiglu, library)
    return PLAIN._replace(
        **{
            name: partial(_differentiate, library, name, partial(fast[name], library) if forward else None)
            for name in fast
        },
        swiglu=swiglu,
    )


def _swiglu(library: ctypes.CDLL, gate_up: Tensor) -> Tensor:
    inner = gate_up.shape[-1] // 2
    takes = gate_up.dtype in _DTYPES and inner % 16 == 0 and gate_up.device.type == "cpu" and gate_up.numel() > 0
    if not (takes and gate_up.requires_grad and torch.is_grad_enabled()):
        return PLAIN.swiglu(gate_up)
    out: Tensor = _Swiglu.apply(library, gate_up)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: ctypes.CDLL, gate_up: Tensor) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(gate_up)
        return PLAIN.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        gate_up, grad = ctx.saved_tensors[0].contiguous(), grad.contiguous()
        out, inner = torch.empty_like(gate_up), grad.shape[-1]
        call = _SwigluBackward(
            gate_up.data_ptr(), grad.data_ptr(), out.data_ptr(), grad.numel() // inner, inner, _DTYPES[grad.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        if ctx.library.keye_swiglu_backward(ctypes.byref(call)):
            raise MemoryError("the compiled core found no memory for its scratch")
        return None, out


def _differentiate(library: ctypes.CDLL, name: str, fast: Callable[..., Any] | None, *inputs: Any) -> Any:
    """`fast(*inputs)`, or the plain operation, with gradients by the library where it takes the operands."""
    plain = getattr(PLAIN, name)
    needs_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if not needs_gradient:
        with torch.no_grad():
            return (fast or plain)(*inputs)
    if not _takes(inputs[0], inputs[2 if name == "add_rms_norm" else 1]):
        return plain(*inputs)
    return _WithGradient.apply(library, name, fast or plain, *inputs)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: ctypes.CDLL, name: str, compute: Callable[..., Any], *inputs: Any) -> Any:
        ctx.library, ctx.name = library, name
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        return compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_of_output: Tensor | None = None) -> tuple[Any, ...]:
        inputs = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        if ctx.name == "add_rms_norm":
            x, delta, weight, eps = inputs
            assert grad_of_output is not None
            grad_x, grad_weight, _ = _run_backward(
                ctx.library, "rms_norm", x + delta, weight, None, eps, None, None, grad_of_output, grad
            )
            return None, None, None, grad_x, grad_x, grad_weight, None
        x, weight, *rest = inputs
        bias = rest.pop(0) if ctx.name == "index_key" else None
        eps, cos, sin = rest if len(rest) == 3 else (rest[0], None, None)
        grad_x, grad_weight, grad_bias = _run_backward(
            ctx.library, ctx.name, x, weight, bias, eps, cos, sin, grad, None
        )
        biases = () if bias is None else (grad_bias,)
        return None, None, None, grad_x, grad_weight, *biases, *(None for _ in rest)


def _run_backward(
    library: ctypes.CDLL, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, cos: Tensor | None,
    sin: Tensor | None, grad: Tensor, grad_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias. `x` is [..., dim], or [N, heads, D] where it is rotated."""
    dim = x.shape[-1]
    if cos is None:
        x = x.contiguous()
        rows, heads, stride = x.numel() // dim, 1, dim
    else:
        rows, heads, _ = x.shape
        x = x if x.stride()[1:] == (dim, 1) else x.contiguous()
        stride = x.stride(0)
    alive = [y.contiguous() for y in (grad, grad_sum, cos, sin) if y is not None]
    places = iter(y.data_ptr() for y in alive)
    to_grad, to_sum, to_cos, to_sin = (0 if y is None else next(places) for y in (grad, grad_sum, cos, sin))
    grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype), torch.empty(dim)
    grad_bias = None if bias is None else torch.empty(dim)
    call = _NormBackward(
        x.data_ptr(), weight.data_ptr(), to_grad, to_sum, to_cos, to_sin, grad_x.data_ptr(), grad_weight.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(), rows, heads, dim, stride, eps, _DTYPES[x.dtype],
        _DTYPES[weight.dtype], bias is not None, name.startswith("index_"), torch.get_num_threads(),
    )  # fmt: skip
    if library.keye_norm_backward(ctypes.byref(call)):
        raise MemoryError("the compiled core found no memory for its scratch")
    return grad_x, grad_weight.to(weight.dtype), None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)


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
