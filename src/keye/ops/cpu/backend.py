"""The compiled core as a backend: selection and attention on the processor, over rows in KV blocks.

Knows the C interface in `native/keye.h` and hands it addresses; how the library comes to be is known to
`keye.ops.cpu.build`. A step is one call, whatever the number of its sequences.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from keye.ops.backend import Kernel, Selected, Stretch
from keye.ops.cpu import build as cpu_build
from keye.ops.cpu import quantized, train
from keye.ops.cpu.build import Status
from keye.ops.cpu.train import MASKED_UP_TO
from keye.ops.kv_blocks import RowFormat

#: A library that was not built before is built when a context first grows beyond this: it takes seconds.
BUILD_ABOVE: Final = 2048
#: Queries whose sets `select` and `attend` hold at once.
_CHUNK = 256
_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_KINDS: Final = {"float32": 0, "float16": 1, "bfloat16": 2, "fp8": 3, "int8": 4, "int4": 5}
_KERNELS: Final[dict[Kernel, int]] = {"auto": 0, "union": 1, "masked": 2}
_FIXED, _WILL_NEED = 1, 2
#: Names of the rows that the library reads.
_ROWS: Final = ("k", "v", "indexer_k")
_MAX_DIM = 256


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("kind", "heads", "dim", "head_bytes")),
    )


class _Stretch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "stop", "first")),
        *((name, _Rows) for name in _ROWS),
        *((name, ctypes.c_int64) for name in ("counts", "sets", "flags")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("q", "indexer_q", "gate", "out")),
        *((name, ctypes.c_int32) for name in (
            "dtype", "indexer_dtype", "heads", "dim", "indexer_heads", "indexer_dim", "topk", "kernel", "threads",
            "masked_below")),
    )  # fmt: skip


class Timers(ctypes.Structure):
    """Seconds spent in each part of the work over all threads, since they were last read."""

    _fields_ = tuple((name, ctypes.c_double) for name in ("score", "select", "attend", "dense"))


class _Encode(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("x", "out", "vectors", "dim", "head_bytes", "dtype", "kind"))


class CpuBackend:
    """`keye.ops.backend.Backend` by one library; `masked_up_to` is the crossover of `kernel="auto"` over k."""

    name = "cpu"

    def __init__(self, library: Path | None = None, masked_up_to: float = MASKED_UP_TO) -> None:
        self._library = None if library is None else load(library)
        # What was found: None before the first search. A library that would have to be built is searched for only once.
        self._status: Status | None = None
        self._searched = False
        self.masked_up_to = masked_up_to

    def takes(self, q: Tensor, stretch: Stretch) -> bool:
        if stretch.blocks is None or q.device.type != "cpu" or q.dtype not in _DTYPES:
            return False
        H, D = q.shape[1:]
        k, v, indexer_k = map(stretch.blocks.get, _ROWS)
        if k is None or v is None or k.addresses is None or v.addresses is None:
            return False
        if D % 16 or D > _MAX_DIM or H % k.format.heads or not k.format.dim == v.format.dim == D:
            return False
        if indexer_k is not None:
            form = indexer_k.format
            if indexer_k.addresses is None or form.dim % 16 or form.dim > _MAX_DIM or form.rotated:
                return False
        return self._loaded(stretch.length) is not None

    def library(self, *, build: bool = True) -> ctypes.CDLL | None:
        """The library, built where there was none, which takes seconds, unless without `build`; None where it cannot be
        used."""
        return self._loaded(BUILD_ABOVE + 1 if build else 0)

    def dense(self, q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        self._call("keye_dense", q, None, None, stretches, 0, out)

    def sparse(
        self, q: Tensor, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
    ) -> None:
        self._call("keye_sparse", q, indexer_q, gate, stretches, topk, out)

    def select(self, indexer_q: Tensor, gate: Tensor, stretch: Stretch, topk: int) -> Iterator[tuple[int, Tensor]]:
        total = stretch.stop - stretch.start
        for offset in range(0, total, _CHUNK):
            sets = torch.empty(min(_CHUNK, total - offset), topk, dtype=torch.int32)
            part = _part(stretch, offset, sets.shape[0])
            self._call("keye_select", None, indexer_q, gate, [part], topk, None, sets=[sets])
            yield offset, sets.long()

    def select_all(self, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], sets: Tensor) -> None:
        assert sets.dtype == torch.int32 and sets.is_contiguous()
        parts = [sets[stretch.start : stretch.stop] for stretch in stretches]
        self._call("keye_select", None, indexer_q, gate, stretches, sets.shape[1], None, sets=parts)

    def attend(self, q: Tensor, selected: Selected, stretch: Stretch, out: Tensor, kernel: Kernel = "auto") -> None:
        for offset, positions in selected:
            sets = positions.to(torch.int32).contiguous()
            part = _part(stretch, offset, positions.shape[0])
            self._call("keye_attend", q, None, None, [part], sets.shape[1], out, sets=[sets], kernel=kernel)

    def encode(self, form: RowFormat, x: Tensor) -> Tensor | None:
        """`form.encode(x)` of codes, up to near ties of int4 scales; None where the library is not there or does not
        take them. Nothing is built."""
        library = self._loaded(0)
        if library is None or form.kind not in ("int8", "int4") or form.dim % 32 or form.dim > _MAX_DIM:
            return None
        if x.device.type != "cpu" or x.dtype not in _DTYPES:
            return None
        x = x.contiguous()
        out = torch.empty(x.shape[0], form.row_bytes, dtype=torch.uint8)
        call = _Encode(
            x.data_ptr(), out.data_ptr(), x.shape[0] * form.heads, form.dim, form.head_bytes, _DTYPES[x.dtype],
            _KINDS[form.kind],
        )  # fmt: skip
        library.keye_encode_rows(ctypes.byref(call))
        return out

    def timers(self) -> Timers:
        """Seconds of each phase since the last call; for benchmarks."""
        timers, library = Timers(), self.library()
        assert library is not None
        library.keye_timers(ctypes.byref(timers))
        return timers

    def _loaded(self, length: int) -> ctypes.CDLL | None:
        """The library, built first where a context of `length` is worth it; None where it cannot be used (yet)."""
        if self._library is not None or self._status is not None:
            return self._library
        if length > BUILD_ABOVE:
            self._status = cpu_build.ready()
        elif not self._searched:
            self._status, self._searched = cpu_build.find(), True
        if self._status is not None and self._status.library is not None:
            self._library = load(self._status.library)
        return self._library

    def _call(
        self, name: str, q: Tensor | None, indexer_q: Tensor | None, gate: Tensor | None, stretches: Sequence[Stretch],
        topk: int, out: Tensor | None, sets: Sequence[Tensor] = (), kernel: Kernel = "auto",
    ) -> None:  # fmt: skip
        """One call of the library. Tensors that are not contiguous are copied."""
        step = _Step(topk=topk, kernel=_KERNELS[kernel], threads=torch.get_num_threads())
        step.masked_below = int(topk * self.masked_up_to)
        result = out
        if q is not None:
            assert out is not None
            q = q.contiguous()
            result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
            step.q, step.out = q.data_ptr(), result.data_ptr()
            step.dtype, (step.heads, step.dim) = _DTYPES[q.dtype], q.shape[1:]
        if indexer_q is not None:
            assert gate is not None
            indexer_q, gate = indexer_q.contiguous(), gate.float().contiguous()
            step.indexer_q, step.gate = indexer_q.data_ptr(), gate.data_ptr()
            step.indexer_dtype, (step.indexer_heads, step.indexer_dim) = _DTYPES[indexer_q.dtype], indexer_q.shape[1:]
        array = (_Stretch * len(stretches))()
        alive = [_fill(array[i], stretch) for i, stretch in enumerate(stretches)]
        for target, part in zip(array, sets, strict=bool(sets)):
            target.sets = part.data_ptr()
        library = self._library
        assert library is not None, "takes() loads the library"
        if getattr(library, name)(ctypes.byref(step), array, len(stretches)):
            raise MemoryError("the compiled core found no memory for its scratch")
        del alive  # the library has read them
        if result is not out and out is not None and result is not None:
            for stretch in stretches:
                out[stretch.start : stretch.stop] = result[stretch.start : stretch.stop]


def _part(stretch: Stretch, offset: int, n: int) -> Stretch:
    """Queries offset .. offset + n of a stretch."""
    start = stretch.start + offset
    return replace(stretch, start=start, stop=start + n, first=stretch.first + offset)


def _fill(to: _Stretch, stretch: Stretch) -> list[Tensor]:
    """Writes a stretch for the library; returns what must stay alive while it reads."""
    assert stretch.blocks is not None
    to.start, to.stop, to.first = stretch.start, stretch.stop, stretch.first
    alive = []
    for name in (name for name in _ROWS if name in stretch.blocks):
        rows, target = stretch.blocks[name], getattr(to, name)
        assert rows.addresses is not None
        alive.append(rows.addresses.contiguous())
        target.blocks = alive[-1].data_ptr()
        target.kind, target.row_bytes, target.heads, target.dim, target.head_bytes = _shape(rows.format)
    if stretch.counts is not None:
        assert stretch.counts.dtype == torch.int64 and stretch.counts.is_contiguous()
        to.counts = stretch.counts.data_ptr()
    mapped = stretch.blocks["k"].mapped or stretch.blocks["v"].mapped
    to.flags = (_FIXED if stretch.fixed else 0) | (_WILL_NEED if mapped else 0)
    return alive


@functools.lru_cache(maxsize=64)
def _shape(form: RowFormat) -> tuple[int, int, int, int, int]:
    return _KINDS[form.kind], form.row_bytes, form.heads, form.dim, form.head_bytes


def load(library: Path) -> ctypes.CDLL:
    """Opens a library of the compiled core."""
    core = ctypes.CDLL(str(library))
    for name in ("keye_dense", "keye_sparse", "keye_select", "keye_attend"):
        function = getattr(core, name)
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_int
    for name in ("keye_linear", "keye_mix_experts", "keye_norm", "keye_norm_backward", "keye_swiglu_backward"):
        getattr(core, name).argtypes, getattr(core, name).restype = (ctypes.c_void_p,), ctypes.c_int
    quantized.declare(core)
    train.declare(core)
    core.keye_encode_rows.argtypes, core.keye_encode_rows.restype = (ctypes.c_void_p,), None
    core.keye_timers.argtypes, core.keye_timers.restype = (ctypes.c_void_p,), None
    return core


def make() -> CpuBackend | None:
    """The backend, or None where it can never run. Builds nothing yet."""
    core = cpu_build.find()
    return None if core is not None and core.library is None else CpuBackend()


def status() -> str:
    """One sentence: what computes sparse attention on this processor, and why not something better."""
    core = cpu_build.find()
    if core is None:
        names = ", ".join(variant.name for variant in cpu_build.runnable())
        return (f"the compiled core ({names}) will be built when a context first exceeds {BUILD_ABOVE} tokens; "
                "`python -m keye.ops.cpu.build` builds it now")  # fmt: skip
    if core.library is None:
        return f"reference, plain torch: {core.note}"
    note = f"; not better because {core.note}" if core.note else ""
    crossover = f"sets are applied as a mask up to {MASKED_UP_TO} k keys"
    return f"compiled core, {core.variant}, {crossover} ({core.library}){note}"
