"""Quantised weights as the compiled core reads them: packed once, then multiplied with activations rounded to int8.

The products equal `keye.ops.quantized.integer_matmul` up to rounding of their sums.

Legend: N rows of activations, M outputs, K inputs, E experts, T tokens.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from keye.ops.mapped import fetch_rows
from keye.ops.quantized import QuantFormat, QuantTensor

_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BITS: Final = {"int4": 4, "int8": 8}
#: Outputs of a matrix that lie together in packed memory.
PAIR_OUTPUTS: Final = 32


class _Quant(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("data", "matrices", "outputs", "inner")),
        *((name, ctypes.c_int32) for name in ("bits", "step", "has_minimum", "scale_kind")),
    )


class _Source(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("codes", "scales", "minima", "group", "groups", "threads"))


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("x", "out", "bias", "sizes", "rows")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    )


class _Experts(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("x", "out", "chosen", "weights", "tokens")),
        *((name, ctypes.c_int32) for name in ("top_k", "dtype", "threads")),
    )


def declare(core: ctypes.CDLL) -> None:
    """Tells ctypes the signatures of the functions that this module calls."""
    for name, count in (("pack", 2), ("unpack", 2), ("matmul", 2), ("experts", 3)):
        function = getattr(core, f"keye_quant_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p,) * count, ctypes.c_int
    core.keye_quant_bytes.argtypes, core.keye_quant_bytes.restype = (ctypes.c_void_p,), ctypes.c_int64


def takes(form: QuantFormat) -> bool:
    """Whether weights of a format can be packed: int4 and int8 whose groups are multiples of 16, or whole rows."""
    return form.kind in _BITS and form.rows == 1 and (form.group is None or form.group % 16 == 0)


class CpuPacked:
    """A matrix [M, K], or one for each expert [E, M, K], in packed memory."""

    def __init__(self, core: ctypes.CDLL, form: QuantFormat, shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
        """Memory that is not written yet; `scale_dtype` is that of scales and minima there."""
        self._core, self.format, self.shape = core, form, shape
        self._scale_dtype, self._is_mapped = scale_dtype, False
        self._quant = _Quant(
            matrices=math.prod(shape[:-2]), outputs=shape[-2], inner=shape[-1], bits=_BITS[form.kind],
            step=math.gcd(form.group or 64, 64), has_minimum=form.has_minimum,
            scale_kind=_DTYPES[scale_dtype],
        )  # fmt: skip
        self._address = ctypes.addressof(self._quant)
        self._data = torch.empty(core.keye_quant_bytes(self._address), dtype=torch.uint8)
        self._quant.data = self._data.data_ptr()

    @classmethod
    def of(cls, core: ctypes.CDLL, weight: QuantTensor) -> CpuPacked:
        """Packs a weight, which `takes` its format. Float32 scales that float16 holds exactly become float16."""
        parts = [part.contiguous() for part in (weight.scales, weight.minima) if part is not None]
        dtype = weight.format.scale_dtype
        if dtype == torch.float32 and all(torch.equal(part.half().float(), part) for part in parts):
            dtype = torch.float16
        packed = cls(core, weight.format, weight.shape, dtype)
        packed._exchange(core.keye_quant_pack, weight.codes.contiguous(), [part.to(dtype) for part in parts])
        return packed

    @property
    def scale_dtype(self) -> torch.dtype:
        """That of scales and minima in packed memory."""
        return self._scale_dtype

    @property
    def data(self) -> Tensor:
        """Its bytes, uint8 [matrices, bytes of each]."""
        return self._data.view(self._quant.matrices, -1)

    def move(self, data: Tensor, *, is_mapped: bool) -> None:
        """Reads the weight from other memory from now on, uint8 [nbytes], which holds the same bytes. Of a mapped file
        the experts of a product are asked for together before they are read."""
        assert data.nbytes == self._data.nbytes
        self._data, self._is_mapped = data, is_mapped
        self._quant.data = data.data_ptr()

    def fetch(self, experts: Tensor) -> None:
        """Has the system read the weights of these experts, int64, ahead, where they lie in a mapped file."""
        if self._is_mapped:
            fetch_rows(self.data, experts.flatten().unique())

    def __deepcopy__(self, memo: object) -> CpuPacked:
        return self  # nothing writes to it

    def unpack(self) -> QuantTensor:
        """The weight, bit for bit."""
        form, shape = self.format, self.shape
        codes = torch.empty(form.code_shape(shape), dtype=form.code_dtype)
        parts = [torch.empty(form.scale_shape(shape), dtype=self._scale_dtype) for _ in range(1 + form.has_minimum)]
        self._exchange(self._core.keye_quant_unpack, codes, parts)
        parts = [part.to(form.scale_dtype) for part in parts]
        return QuantTensor(form, shape, codes, parts[0], parts[1] if form.has_minimum else None)

    def unpack_rows(self, expert: int, rows: slice) -> QuantTensor:
        """Rows of one matrix, from a multiple of 32 on: those that lie together in packed memory."""
        assert rows.start % PAIR_OUTPUTS == 0
        pair_bytes = self.data.shape[1] // -(-self.shape[-2] // PAIR_OUTPUTS)
        shape = (rows.stop - rows.start, self.shape[-1])
        part = CpuPacked(self._core, self.format, shape, self._scale_dtype)
        begin = rows.start // PAIR_OUTPUTS * pair_bytes
        part.move(self.data[expert, begin : begin + part.nbytes], is_mapped=False)
        return part.unpack()

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def matmul(self, x_NK: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T (+ `bias` [M]) -> [N, M] in the dtype of `x`."""
        return self._multiply(x_NK, 0, bias.float() if bias is not None else None)

    def grouped_matmul(self, x_NK: Tensor, sizes: Sequence[int]) -> Tensor:
        """The same for rows that are sorted by expert, `sizes` of each -> [N, M]."""
        assert len(sizes) == self._quant.matrices and sum(sizes) == x_NK.shape[0]
        if self._is_mapped:
            self.fetch(torch.tensor(sizes).nonzero())
        array = (ctypes.c_int64 * len(sizes))(*sizes)
        return self._multiply(x_NK, ctypes.addressof(array), None)

    def _multiply(self, x_NK: Tensor, sizes: int, bias: Tensor | None) -> Tensor:
        x = x_NK.contiguous()
        assert x.shape[1] == self.shape[-1], "the rows have as many numbers as the matrix has inputs"
        out = x.new_empty(x.shape[0], self.shape[-2])
        call = _Rows(x.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr(), sizes, x.shape[0],
                     _DTYPES[x.dtype], torch.get_num_threads())  # fmt: skip
        _check(self._core.keye_quant_matmul(self._address, ctypes.addressof(call)))
        return out

    def _exchange(self, function: ctypes._NamedFuncPointer, codes: Tensor, parts: list[Tensor]) -> None:
        """Packs from, or unpacks to, canonical codes and [scales, minima]."""
        group = self.format.group or self.shape[-1]
        file = _Source(codes.data_ptr(), parts[0].data_ptr(), parts[-1].data_ptr(), group, parts[0].shape[-1],
                       torch.get_num_threads())  # fmt: skip
        _check(function(self._address, ctypes.addressof(file)))


def mix_experts(
    gate_up: CpuPacked, down: CpuPacked, x_TK: Tensor, weights_TK: Tensor, chosen_TK: Tensor
) -> Tensor | None:
    """Routed experts in one call: sum over a token's experts of weight * down(silu(gate x) * up x), [T, d] in the dtype
    of `x`. `gate_up` [E, 2I, d], `down` [E, d, I]; `weights` and `chosen` int64 [T, top-k]. None where I is not a
    multiple of 32."""
    if down.shape[-1] % 32:
        return None
    x, chosen, weights = x_TK.contiguous(), chosen_TK.contiguous(), weights_TK.float().contiguous()
    for packed in (gate_up, down):
        packed.fetch(chosen)
    out = torch.empty_like(x)
    call = _Experts(x.data_ptr(), out.data_ptr(), chosen.data_ptr(), weights.data_ptr(), x.shape[0], chosen.shape[1],
                    _DTYPES[x.dtype], torch.get_num_threads())  # fmt: skip
    _check(gate_up._core.keye_quant_experts(gate_up._address, down._address, ctypes.addressof(call)))
    return out


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("the compiled core found no memory for its scratch")
