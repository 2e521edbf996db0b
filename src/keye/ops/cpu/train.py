"""Attention over sets of keys in training by the compiled core, forward and backward.

`keye.ops.tree` says what is computed, `keye.ops.tree_tiles` is the definition, `native/train.h` the C interface.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from keye.ops.tree_tiles import Needs, Operands, Saved

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
_POINTERS: Final = (
    "q", "k", "v", "indexer_q", "indexer_k", "gate", "sets", "out", "lse", "indexer_lse", "grad_out", "grad_q",
    "grad_k", "grad_v", "grad_indexer_q", "grad_indexer_k", "grad_gate",
)  # fmt: skip
_MULTIPLE, _MAX_DIM = 32, 256


class _Train(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("queries", "keys", "width")),
        ("kl", ctypes.c_double),
        *((name, ctypes.c_int32) for name in (
            "dtype", "heads", "groups", "dim", "indexer_heads", "indexer_dim", "threads", "reserved")),
    )  # fmt: skip


def declare(core: ctypes.CDLL) -> None:
    core.keye_train_rows.argtypes, core.keye_train_rows.restype = (ctypes.c_int,), ctypes.c_int
    for name in ("keye_train_forward", "keye_train_backward"):
        getattr(core, name).argtypes, getattr(core, name).restype = (ctypes.c_void_p,), ctypes.c_int


def takes(operands: Operands) -> bool:
    """Whether the core can compute these."""
    q, k, v, indexer_q, indexer_k, gate = operands
    dims = [q.shape[2]]
    if indexer_q is not None and indexer_k is not None:
        dims.append(indexer_q.shape[2])
        if not indexer_q.dtype == indexer_k.dtype == q.dtype:
            return False
    return (
        q.device.type == "cpu" and q.dtype in _DTYPES and q.dtype == k.dtype == v.dtype and k.shape == v.shape
        and q.numel() > 0 and all(dim % _MULTIPLE == 0 and dim <= _MAX_DIM for dim in dims)
        and (gate is None or gate.dtype == torch.float32)
    )  # fmt: skip


def forward(core: ctypes.CDLL, operands: Operands, sets: Tensor, *, teach: bool) -> tuple[Saved, Tensor]:
    """`keye.ops.tree_tiles.forward` over sets."""
    q = operands.q
    saved = Saved(
        torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2]), torch.empty(len(q)) if teach else None
    )  # fmt: skip
    call, alive = _call(core, operands if teach else Operands(*operands[:3]), sets, saved)
    _run(core.keye_train_forward, call)
    del alive
    return saved, torch.tensor(call.kl, dtype=torch.float32)


def backward(
    core: ctypes.CDLL, operands: Operands, sets: Tensor, saved: Saved, grad_out: Tensor, grad_kl: Tensor, needs: Needs
) -> list[Tensor | None]:
    """`keye.ops.tree_tiles.backward` over sets."""
    call, alive = _call(core, operands, sets, saved)
    grad_out = grad_out.contiguous()
    wanted = [*(needs.attention,) * 3, *(needs.indexer,) * 3]
    grads = [
        torch.empty(x.shape, dtype=x.dtype) if x is not None and want else None
        for x, want in zip(operands, wanted, strict=True)
    ]
    for name, grad in zip(Operands._fields, grads, strict=True):
        setattr(call, f"grad_{name}", None if grad is None else grad.data_ptr())
    call.grad_out, call.kl = grad_out.data_ptr(), float(grad_kl)
    _run(core.keye_train_backward, call)
    del alive
    return grads


def _call(core: ctypes.CDLL, operands: Operands, sets: Tensor, saved: Saved) -> tuple[_Train, list[Tensor]]:
    """The call without gradients, and what must stay alive while the library reads."""
    (T, H, D), (S, G, _), dtype = operands.q.shape, operands.k.shape, _DTYPES.index(operands.q.dtype)
    rows = _DTYPES[core.keye_train_rows(dtype)]
    call = _Train(
        queries=T, keys=S, width=sets.shape[1], dtype=dtype, heads=H, groups=G, dim=D, threads=torch.get_num_threads()
    )
    if operands.indexer_q is not None:
        call.indexer_heads, call.indexer_dim = operands.indexer_q.shape[1:]
    tensors = operands._asdict() | saved._asdict() | {"sets": sets}
    for name in ("k", "v", "indexer_k"):
        tensors[name] = None if tensors[name] is None else tensors[name].to(rows)
    alive = []
    for name, x in tensors.items():
        if x is not None:
            alive.append(x.detach().contiguous())
            setattr(call, name, alive[-1].data_ptr())
    return call, alive


def _run(function: ctypes._NamedFuncPointer, call: _Train) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("the compiled core found no memory for its scratch")
