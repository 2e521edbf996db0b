"""Attention of one layer of a step, sparse or dense, by the backend that suits the device.

A step holds the tokens of several sequences; a `Stretch` says which of its rows belong to one sequence
and where the past of that sequence is. Backends: `reference` (plain torch, any device, the definition), `cpu` (the
compiled core) and `triton` (GPUs). A fast one says which stretches it can take; the reference takes the others, and
both give the same sets, and the same outputs up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.config import kernel_config
from keye.errors import KeyeError
from keye.ops import quantized
from keye.ops.backend import REFERENCE, Backend, Selected, Stretch
from keye.ops.cpu import elementwise as cpu_elementwise
from keye.ops.cpu import gemv
from keye.ops.cpu import quantized as packed
from keye.ops.elementwise import PLAIN, Elementwise
from keye.ops.kv_blocks import RowFormat
from keye.ops.quantized import PackedWeight, QuantFormat, QuantTensor

#: Fewest rows for products of float8 with float8, and the compute capability of cards whose kernel scales rows.
FLOAT8_ROWS: Final = 64
FLOAT8_CAPABILITY: Final = (9, 0)
#: Width from which a model computes its small operations by the compiled core, which may have to be built first.
NATIVE_WIDTH: Final = 1024
#: Rows of a training step from which building the compiled core is worth it.
BUILD_ROWS: Final = 512
BackendName = Literal["auto", "reference", "cpu", "triton"]


class Backends:
    """The backends that this machine has, each made when it is first needed, and which of them is in use: the one
    chosen here, else the one that KEYE_KERNELS names. `auto` is the fastest that a device has."""

    def __init__(self) -> None:
        self._choice: BackendName | None = None
        self._ready: dict[str, Backend | None] = {"reference": REFERENCE}

    def choose(self, name: str) -> None:
        """Uses a backend from now on. `KeyeError` for a name that is not known or a backend that cannot run here."""
        known: dict[str, BackendName] = {known: known for known in get_args(BackendName)}
        if name not in known:
            raise KeyeError(f"the kernels {name!r} are not known; choose one of {', '.join(known)}")
        if name != "auto" and self.find(name) is None:
            raise KeyeError(f"the {name} kernels cannot run here; `keye doctor` says why, and 'reference' always can")
        self._choice = known[name]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Uses a backend for the length of a block; errors as in `choose`."""
        before = self._choice
        self.choose(name)
        try:
            yield
        finally:
            self._choice = before

    def of(self, device: torch.device) -> Backend:
        """The backend in use for tensors of a device."""
        if self._choice is None:
            self.choose(kernel_config().kernels)
        name = self._choice
        if name is None or name == "auto":
            name = "cpu" if device.type == "cpu" else "triton"
        return self.find(name) or REFERENCE

    def find(self, name: str) -> Backend | None:
        """The backend of a name; None where it cannot run here."""
        if name not in self._ready:
            # Imported only where it is asked for: a backend takes a compiler or triton.
            if name == "cpu":
                from keye.ops.cpu import backend as cpu

                self._ready[name] = cpu.make()
            else:
                from keye.ops import triton

                self._ready[name] = triton.make()
        return self._ready[name]


#: Those that the functions of this module use.
backends: Final = Backends()


def dense_attention(q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
    """Causal attention of every stretch over all its keys, written to `out` [T, H, D]."""
    for backend, part in _assign(q, stretches):
        backend.dense(q, part, out)


def sparse_attention(
    q: Tensor, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
) -> None:
    """Attention of every query over the `topk` keys that the indexer scores highest, written to `out` [T, H, D]."""
    for backend, part in _assign(q, stretches):
        backend.sparse(q, indexer_q, gate, part, topk, out)


def attend_selected(q: Tensor, selected: Selected, stretch: Stretch, out: Tensor) -> None:
    """Attention of one stretch over sets that something else than the indexer chose, written to `out` [T, H, D]."""
    for backend, _ in _assign(q, [stretch]):
        backend.attend(q, selected, stretch, out)


def select_keys(q: Tensor, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], sets: Tensor) -> None:
    """The keys that `sparse_attention` would attend to, as positions, ascending and then -1: written to the rows of the
    stretches in `sets` int32 [T, topk]. Keys and values are not read."""
    for backend, part in _assign(q, stretches):
        backend.select_all(indexer_q, gate, part, sets)


def find_grouped_matmul(x: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor, list[int]], Tensor] | None:
    """A kernel for products of rows `x` [N, K] that are sorted by expert with `weights` [E, K, M] of the same dtype;
    its third argument is the number of rows of each expert. None on processors and in training (it has no backward
    pass): `keye.models.moe` loops over experts there, which is the definition."""
    if torch.is_grad_enabled() or x.dtype != weights.dtype or backends.of(x.device).name != "triton":
        return None
    from keye.ops import triton

    if not triton.serves(x):
        return None
    from keye.ops.triton.experts import grouped_matmul

    return grouped_matmul


def encode_rows(form: RowFormat, x: Tensor) -> Tensor:
    """`form.encode(x)`, by the compiled core where it has been built: vectors [N, G, D] -> uint8 [N, row_bytes]."""
    encode = getattr(backends.of(x.device), "encode", None)
    encoded: Tensor | None = None if encode is None or form.plain else encode(form, x)
    return form.encode(x) if encoded is None else encoded


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which is the definition, or the compiled core's where few rows `x` [..., K] meet a
    large bfloat16 `weight` [M, K]. Returns [..., M]."""
    if gemv.takes_linear(x, weight) and (library := _find_library(x)) is not None:
        return gemv.linear(library, x, weight, bias)
    return F.linear(x, weight, bias)


def score_experts(x: Tensor, weight: Tensor) -> Tensor:
    """The product of `linear` in float32, whatever the dtypes: scores of all experts, float32 [T, E]."""
    if gemv.takes_linear(x, weight) and (library := _find_library(x)) is not None:
        return gemv.linear(library, x, weight, None, torch.float32)
    return F.linear(x.float(), weight.float())


def mix_experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """Tokens `x` [T, d] through their `chosen` experts int64 [T, K], summed with `weights` float32 [T, K], by the
    compiled core; None where it does not take them. Weights of experts are as `keye.models.moe.Experts` has them."""
    if gemv.takes_experts(x, chosen, gate_up, down) and (library := _find_library(x)) is not None:
        return gemv.mix_experts(library, x, weights, chosen, gate_up, down)
    return None


def find_elementwise(device: torch.device, width: int) -> Elementwise:
    """The small operations for inference on a device with a model of some width: those of the compiled core, built
    where it was not, or the plain ones, as for narrow models."""
    if width < NATIVE_WIDTH:
        return PLAIN
    library = getattr(backends.of(device), "library", None)
    core = None if library is None else library()
    return PLAIN if core is None else cpu_elementwise.make(core)


def pack_weight(weight: QuantTensor) -> PackedWeight | None:
    """A quantised weight as the fast kernels of its device read it, which takes as much memory again; None where there
    are none for its format. The compiled core is built where it was not."""
    library = _find_library(weight.codes) if packed.takes(weight.format) else None
    return None if library is None else packed.CpuPacked.of(library, weight)


def multiply_quantized(x: Tensor, weight: QuantTensor, sizes: list[int] | None = None) -> Tensor:
    """`quantized.matmul`, or with `sizes` rows of each expert `quantized.grouped_matmul`, for a weight that is not
    packed: by a kernel on cards, else by the definition. Cards that multiply float8 do so where there are many rows,
    whose activations are rounded to float8 then; few rows cost what reading the weight costs."""
    is_large = sizes is None and len(x) >= FLOAT8_ROWS and x.is_cuda and not torch.is_grad_enabled()
    if is_large and quantized.takes_scaled(weight) and torch.cuda.get_device_capability(x.device) >= FLOAT8_CAPABILITY:
        return quantized.scaled_matmul(x, weight)
    if not torch.is_grad_enabled() and backends.of(x.device).name == "triton":
        from keye.ops import triton

        if triton.serves(x):
            from keye.ops.triton.quantized import multiply

            return multiply(x, weight, sizes)
    return quantized.matmul(x, weight) if sizes is None else quantized.grouped_matmul(x, weight, sizes)


def empty_packed(form: QuantFormat, shape: tuple[int, ...], scale_dtype: torch.dtype) -> PackedWeight | None:
    """A packed weight in main memory that is not written yet; None where `pack_weight` would make none."""
    library = _find_library(torch.empty(0)) if packed.takes(form) else None
    return None if library is None else packed.CpuPacked(library, form, shape, scale_dtype)


def describe_packing() -> str:
    """What the layout of packed weights depends on: the compiled core by its name, which changes with its sources."""
    library = _find_library(torch.empty(0))
    return "" if library is None else os.path.basename(library._name)


def mix_packed_experts(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: PackedWeight | None, down: PackedWeight | None
) -> Tensor | None:
    """As `mix_experts` for packed weights [E, 2I, d] and [E, d, I], of any number of tokens."""
    if isinstance(gate_up, packed.CpuPacked) and isinstance(down, packed.CpuPacked):
        return packed.mix_experts(gate_up, down, x, weights, chosen)
    return None


def find_core(x: Tensor, rows: int) -> CDLL | None:
    """The compiled core for training where it is the backend in use for a device: built for many `rows`, else used
    where it was built before."""
    library = getattr(backends.of(x.device), "library", None)
    return None if library is None else library(build=rows >= BUILD_ROWS)


def find_training_elementwise(device: torch.device, width: int) -> Elementwise:
    """The small operations for training a model of some width: results are those of inference to the last bit,
    gradients are the compiled core's where it can be built."""
    library = getattr(backends.of(device), "library", None)
    core = None if library is None else library()
    return PLAIN if core is None else cpu_elementwise.make(core, forward=width >= NATIVE_WIDTH)


def _find_library(x: Tensor) -> CDLL | None:
    """The compiled core where it is the backend in use for a device."""
    library = getattr(backends.of(x.device), "library", None)
    return None if library is None else library()


def _assign(q: Tensor, stretches: Sequence[Stretch]) -> Iterator[tuple[Backend, list[Stretch]]]:
    """The stretches of each backend that has any."""
    backend = backends.of(q.device)
    fast = [stretch for stretch in stretches if backend.takes(q, stretch)]
    if fast:
        yield backend, fast
    if len(fast) < len(stretches):
        yield REFERENCE, [stretch for stretch in stretches if not backend.takes(q, stretch)]
