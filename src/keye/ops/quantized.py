"""Quantised matrices: number formats of weights, their layout in memory and files, and products with them.

The functions here are the definition in plain torch, on any device. Every matrix is [outputs, inputs]; experts are
stacked in leading dimensions.

Legend: N rows of activations, M outputs, K inputs, G groups of inputs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.errors import KeyeError

QuantKind = Literal["int8", "int4", "fp8"]
#: Inputs of an activation row that share a scale.
ACTIVATION_GROUP: Final = 64
#: The largest number of each kind; int4 goes down to -8.
LARGEST: Final[dict[QuantKind, float]] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_CODES: Final = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
_SCALES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantFormat:
    """How the numbers of a matrix [..., M, K] are stored.

    * `int4`: codes uint8 [..., M, ceil(K / 2)]: byte j holds input 2j in its low half and 2j + 1 in its high half. A
      number is (half - 8) * scale, or half * scale + minimum with `has_minimum`.
    * `int8`: codes int8 [..., M, K]; code * scale, plus the minimum with `has_minimum`.
    * `fp8`: codes float8 e4m3 [..., M, K]; code * scale.

    `group` inputs share a scale (None: the whole row; the last group may be short), and so do `rows` outputs. Scales
    and minima are [..., ceil(M / rows), G] in `scale_dtype`, bfloat16 or, where a file needs it, float16 or float32.
    """

    kind: QuantKind
    group: int | None = None
    has_minimum: bool = False
    rows: int = 1
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.kind not in get_args(QuantKind):
            raise KeyeError(f"the format {self.kind!r} is not known; choose one of {', '.join(get_args(QuantKind))}")
        if (self.group is not None and self.group < 1) or self.rows < 1:
            raise KeyeError(f"a scale is shared by {self.group} inputs and {self.rows} outputs; give at least 1")
        if self.scale_dtype not in _SCALES:
            raise KeyeError(f"scales are {self.scale_dtype}; they are bfloat16, float16 or float32")
        assert not (self.kind == "fp8" and self.has_minimum)

    def __str__(self) -> str:
        per = "row" if self.group is None else f"{self.group}"
        return f"{self.kind} per {per}" + (f" x {self.rows}" if self.rows > 1 else "")

    @property
    def code_dtype(self) -> torch.dtype:
        return _CODES[self.kind]

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes of a matrix."""
        return (*shape[:-1], -(-shape[-1] // 2)) if self.kind == "int4" else tuple(shape)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its scales, and of its minima."""
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // (self.group or shape[-1])))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of this shape."""
        codes, scales = self.code_shape(shape), self.scale_shape(shape)
        scale_bytes = self.scale_dtype.itemsize * (2 if self.has_minimum else 1)
        return torch.Size(codes).numel() + torch.Size(scales).numel() * scale_bytes

    def to_dict(self) -> dict[str, Any]:
        """The format as a file has it: what differs from the defaults, and the kind."""
        out: dict[str, Any] = {"kind": self.kind, "group": self.group}
        if self.has_minimum:
            out["has_minimum"] = True
        if self.rows > 1:
            out["rows"] = self.rows
        if self.scale_dtype != torch.bfloat16:
            out["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
        return out

    @classmethod
    def from_dict(cls, value: object) -> QuantFormat:
        """A format of a file. `KeyeError` for what no version of keye writes."""
        known = {"kind", "group", "has_minimum", "rows", "scale_dtype"}
        if not isinstance(value, dict) or "kind" not in value or not set(value) <= known:
            raise KeyeError(f"{value!r} is not a format of weights; it needs a kind, and may have a group")
        group, rows, dtype = value.get("group"), value.get("rows", 1), value.get("scale_dtype", "bfloat16")
        has_minimum = value.get("has_minimum", False)
        if type(rows) is not int or not (group is None or type(group) is int) or type(has_minimum) is not bool:
            raise KeyeError(f"{value!r} is not a format of weights: group and rows are whole numbers")
        if dtype not in ("bfloat16", "float16", "float32") or (has_minimum and value["kind"] == "fp8"):
            raise KeyeError(f"{value!r} is not a format of weights that keye reads")
        return cls(value["kind"], group, has_minimum=has_minimum, rows=rows, scale_dtype=getattr(torch, dtype))


@dataclass
class QuantTensor:
    """A matrix [..., M, K] in a format; see `QuantFormat` for the layout of the tensors."""

    format: QuantFormat
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None

    def __post_init__(self) -> None:
        form = self.format
        assert self.codes.dtype == form.code_dtype and tuple(self.codes.shape) == form.code_shape(self.shape)
        assert self.scales.dtype == form.scale_dtype and tuple(self.scales.shape) == form.scale_shape(self.shape)
        assert (self.minima is not None) == form.has_minimum
        assert self.minima is None or (self.minima.shape, self.minima.dtype) == (self.scales.shape, self.scales.dtype)

    @classmethod
    def empty(cls, form: QuantFormat, shape: tuple[int, ...], device: torch.device | str = "cpu") -> QuantTensor:
        """One whose numbers are not written yet."""
        scales = torch.empty(form.scale_shape(shape), dtype=form.scale_dtype, device=device)
        codes = torch.empty(form.code_shape(shape), dtype=form.code_dtype, device=device)
        return cls(form, tuple(shape), codes, scales, torch.empty_like(scales) if form.has_minimum else None)

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)

    def __getitem__(self, i: int | slice) -> QuantTensor:
        """A view of a part along the first of the leading dimensions, or of rows of a matrix; those that share scales
        stay together."""
        codes, among = self.codes[i], i
        shape = (*codes.shape[:-1], self.shape[-1])
        if len(self.shape) == 2:
            assert isinstance(i, slice)
            begin, end, step = i.indices(self.shape[0])
            rows = self.format.rows
            assert step == 1 and begin % rows == 0 and (end % rows == 0 or end == self.shape[0])
            among = slice(begin // rows, -(-end // rows))
        minima = None if self.minima is None else self.minima[among]
        return QuantTensor(self.format, shape, codes, self.scales[among], minima)

    def copy_(self, other: QuantTensor) -> None:
        """Takes the numbers of another of the same format and shape."""
        assert (self.format, self.shape) == (other.format, other.shape)
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales)
        if self.minima is not None and other.minima is not None:
            self.minima.copy_(other.minima)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers [..., M, K], computed in float32 (float64 where that is asked for)."""
        form, K = self.format, self.shape[-1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = unpack_int4(self.codes, K) if form.kind == "int4" else self.codes
        values = values.to(wide)
        if form.kind == "int4" and not form.has_minimum:
            values -= 8
        G = self.scales.shape[-1]
        if form.rows == 1 and K == G * (
            form.group or K
        ):  # groups of one size: much faster than a scale for each number
            groups, spread = values.unflatten(-1, (G, -1)), _append_dimension
        else:
            groups, spread = values, self._spread
        groups *= spread(self.scales.to(wide))
        if self.minima is not None:
            groups += spread(self.minima.to(wide))
        return values.to(dtype)

    def _spread(self, scales: Tensor) -> Tensor:
        """Scales beside every number that they belong to, [..., M, K] or [..., M, 1]."""
        form, (M, K) = self.format, self.shape[-2:]
        if form.rows > 1:
            scales = scales.repeat_interleave(form.rows, -2)[..., :M, :]
        if scales.shape[-1] == 1:
            return scales
        assert form.group is not None
        return scales.repeat_interleave(form.group, -1)[..., :K]


def _append_dimension(scales: Tensor) -> Tensor:
    return scales.unsqueeze(-1)


class PackedWeight(Protocol):
    """A matrix [M, K], or one for each expert [E, M, K], as a fast kernel reads it. Its products round activations to
    int8 and equal `integer_matmul` up to rounding of the sums; they have no backward pass."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """That of scales and minima in packed memory."""

    @property
    def data(self) -> Tensor:
        """Its bytes, uint8 [matrices, bytes of each]."""

    def move(self, data: Tensor, *, is_mapped: bool) -> None:
        """Reads the weight from other memory from now on, uint8 [nbytes], which holds the same bytes. Of a mapped file
        the experts of a product are asked for together before they are read."""

    def unpack(self) -> QuantTensor:
        """The weight, bit for bit."""

    def unpack_rows(self, expert: int, rows: slice) -> QuantTensor:
        """Rows of one matrix, from a multiple of 32 on."""

    def matmul(self, x_NK: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T (+ `bias` [M]) -> [N, M] in the dtype of `x`."""

    def grouped_matmul(self, x_NK: Tensor, sizes: list[int]) -> Tensor:
        """The same for rows that are sorted by expert, `sizes` of each -> [N, M]."""


def pack_int4(halves: Tensor) -> Tensor:
    """Integers 0 .. 15 [..., K] -> uint8 [..., ceil(K / 2)], the even ones in the low halves."""
    halves = F.pad(halves.to(torch.uint8), (0, halves.shape[-1] % 2)).contiguous()
    pairs = halves.view(torch.int16)  # much faster than the bytes by strides
    return (pairs | pairs >> 4).to(torch.uint8)


def unpack_int4(codes: Tensor, K: int) -> Tensor:
    """The opposite: uint8 [..., ceil(K / 2)] -> uint8 [..., K]."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :K]


def split_groups(x: Tensor, group: int | None) -> Tensor:
    """[..., K] -> [..., G, group], the last group filled up with zeros."""
    group = min(group or x.shape[-1], x.shape[-1])
    return F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def quantize_activations(x_NK: Tensor, group: int = ACTIVATION_GROUP) -> tuple[Tensor, Tensor]:
    """Int8 codes [N, K] and float32 scales [N, G] of activations: the scale is the group's largest magnitude / 127, a
    code x * (127 / that magnitude) in float32, rounded to the nearest and at ties to the even one. Groups without a
    magnitude above 1e-30 are zero."""
    parts = split_groups(x_NK.float(), group)
    largest = parts.abs().amax(-1, keepdim=True)
    factor = largest.new_tensor(127.0) / largest  # torch takes `127 / largest` for 127 * (1 / largest): rounded twice
    codes = (parts * torch.where(largest > 1e-30, factor, 0)).round().clamp(-127, 127)
    return codes.to(torch.int8).flatten(1)[:, : x_NK.shape[1]], largest.squeeze(-1) / 127


def round_activations(x_NK: Tensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """Activations as integer kernels see them, float64 [N, K]."""
    codes, scales = quantize_activations(x_NK, group)
    return (split_groups(codes.double(), group) * scales.double().unsqueeze(-1)).flatten(1)[:, : x_NK.shape[1]]


def exact_matmul(x_NK: Tensor, weight: QuantTensor) -> Tensor:
    """The definition where only the weights are rounded: x @ weight.T in float32 -> [N, M] in the dtype of `x`."""
    return F.linear(x_NK.float(), weight.dequantize()).to(x_NK.dtype)


def integer_matmul(x_NK: Tensor, weight: QuantTensor, group: int = ACTIVATION_GROUP) -> Tensor:
    """The definition of kernels on int8 activations, which they equal up to rounding of the sums: [N, M] in the dtype
    of `x`."""
    return F.linear(round_activations(x_NK, group), weight.dequantize(torch.float64)).to(x_NK.dtype)


def matmul(x_NK: Tensor, weight: QuantTensor) -> Tensor:
    """x @ weight.T for activations of any floating dtype -> [N, M] in their dtype."""
    return F.linear(x_NK, weight.dequantize(x_NK.dtype))


def scaled_matmul(x_NK: Tensor, weight: QuantTensor) -> Tensor:
    """The product by torch's float8 kernel, for float8 weights with a scale for each row whose sizes are multiples of
    16: activations are rounded to e4m3, each row with a scale of its own. [N, M] in the dtype of `x`."""
    largest = x_NK.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST["fp8"]
    codes = (x_NK.float() / largest).clamp_(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)
    scales = weight.scales.float().t().contiguous()
    return torch._scaled_mm(codes, weight.codes.t(), largest, scales, out_dtype=torch.bfloat16).to(x_NK.dtype)


def takes_scaled(weight: QuantTensor) -> bool:
    """Whether `scaled_matmul` can multiply by a weight."""
    form, (M, K) = weight.format, weight.shape[-2:]
    return form.kind == "fp8" and form.group is None and form.rows == 1 and not M % 16 and not K % 16


def grouped_matmul(x_NK: Tensor, weight: QuantTensor, sizes: list[int]) -> Tensor:
    """The same for rows that are sorted by expert, `sizes` of each, and weights [E, M, K] -> [N, M]."""
    rows = x_NK.split(sizes)
    parts = [matmul(part, weight[e]) for e, part in enumerate(rows) if part.shape[0]]
    return torch.cat(parts) if parts else x_NK.new_empty(0, weight.shape[-2])
