"""How numbers become codes: the scales of a matrix, searched for the least error where the codes are few.

In blocks that stay in the processor's cache; `python -m benchmarks.quant_speed` measures it.

Legend: M outputs, K inputs, G groups of n inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.ops.cpu import scales
from keye.ops.quantized import LARGEST, QuantFormat, QuantTensor, pack_int4, split_groups

#: Scales that are tried for a group of int4 codes whose errors are weighted, as shares of the one that reaches its
#: largest number. With 55 in steps of 0.01 the error of normal numbers is 0.2 % lower, the speed a quarter.
SHARES: Final = (1.05, 1.0, 0.96, 0.92, 0.88, 0.84, 0.80)
#: Numbers that are worked on at once: 512 KiB in float32.
BLOCK: Final = 1 << 17
_SMALLEST: Final = 1e-30


class QuantError(KeyeError):
    """Numbers that cannot be quantised."""


@dataclass
class Loss:
    """What quantisation lost, as sums over numbers; with weights of inputs, each square counts by its input's."""

    numbers: int = 0
    squares: float = 0.0
    errors: float = 0.0
    weighted_squares: float = 0.0
    weighted_errors: float = 0.0

    def add(self, other: Loss) -> None:
        for name in ("numbers", "squares", "errors", "weighted_squares", "weighted_errors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def relative(self) -> float:
        """Root of the squared error over that of the numbers."""
        return (self.errors / self.squares) ** 0.5 if self.squares else 0.0

    @property
    def weighted(self) -> float:
        """The same where every square counts by the weight of its input."""
        return (self.weighted_errors / self.weighted_squares) ** 0.5 if self.weighted_squares else 0.0


def quantize(x_MK: Tensor, form: QuantFormat, importance: Tensor | None = None) -> QuantTensor:
    """A matrix of any floating dtype [..., M, K] in a format. `importance` float32 [K] is the mean squared activation
    of each input; its root weighs errors in the search of int4 scales. With the mean square itself, which a few tokens
    of large activations decide, keye-nano's answers move seven times as far from those of bfloat16. `QuantError` for
    NaN and infinite numbers."""
    out = QuantTensor.empty(form, tuple(x_MK.shape), x_MK.device)
    quantize_into(out, x_MK, importance)
    return out


def quantize_into(out: QuantTensor, x_MK: Tensor, importance: Tensor | None = None, loss: Loss | None = None) -> None:
    """`quantize`, written to a tensor of this shape; what it loses is added to `loss`."""
    assert tuple(x_MK.shape) == out.shape and not out.format.has_minimum
    if len(out.shape) > 2:
        for i in range(out.shape[0]):
            quantize_into(out[i], x_MK[i], importance, loss)
        return
    M, K = out.shape
    rows = max(1, BLOCK // max(1, K) // out.format.rows) * out.format.rows
    for begin in range(0, M, rows):
        end, x = min(M, begin + rows), x_MK[begin : begin + rows].float().contiguous()
        _quantize_block(out, begin, end, x, importance, loss)


def _quantize_block(
    out: QuantTensor, begin: int, end: int, x: Tensor, importance: Tensor | None, loss: Loss | None
) -> None:
    """Rows `begin .. end` of a matrix, float32 [end - begin, K]."""
    form, K = out.format, x.shape[1]
    weights = None if importance is None else split_groups(importance.to(x), form.group)
    groups = split_groups(x, form.group)
    scale = _int4_scales(groups, weights) if form.kind == "int4" else _largest_scales(groups, form)
    rounded = scale.to(form.scale_dtype)
    scale = rounded.float()
    if form.kind == "int4":
        low = -8
        codes = scales.encode(groups.flatten(0, 1), scale.flatten(), None, low, 7).view(groups.shape)
    elif form.kind == "int8":
        low = 0
        codes = (groups / scale).round_().clamp_(-LARGEST["int8"], LARGEST["int8"]).to(torch.int8)
    else:
        low = 0
        codes = (groups / scale).clamp_(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)
    flat = codes.flatten(1)[:, :K]
    out.codes[begin:end] = pack_int4(flat) if form.kind == "int4" else flat
    first, last = begin // form.rows, -(-end // form.rows)
    out.scales[first:last] = rounded.squeeze(-1)[:: form.rows]
    if loss is not None:
        errors = codes.float().add_(low).mul_(scale).sub_(groups).square_()
        _add_loss(loss, groups, errors, weights, x.numel())


def _add_loss(loss: Loss, groups: Tensor, errors: Tensor, weights: Tensor | None, numbers: int) -> None:
    loss.numbers += numbers
    loss.squares += float(groups.square().sum(dtype=torch.float64))
    loss.errors += float(errors.sum(dtype=torch.float64))
    if weights is not None:
        loss.weighted_errors += float((errors * weights).sum(dtype=torch.float64))
        loss.weighted_squares += float((groups.square() * weights).sum(dtype=torch.float64))


def _largest_scales(groups: Tensor, form: QuantFormat) -> Tensor:
    """Scales [M, G, 1] that reach the largest magnitude, rounded up to the dtype of scales, equal over `form.rows`."""
    largest = _check_finite(groups.abs().amax(-1, keepdim=True)) / LARGEST[form.kind]
    if form.rows > 1:
        padded = torch.nn.functional.pad(largest, (0, 0, 0, 0, 0, -len(largest) % form.rows))
        largest = padded.unflatten(0, (-1, form.rows)).amax(1).repeat_interleave(form.rows, 0)[: len(largest)]
    largest = largest.clamp_min(_SMALLEST)
    rounded = largest.to(form.scale_dtype).float()
    return torch.where(rounded < largest, rounded * (1 + 2**-7), rounded)


def _int4_scales(groups: Tensor, weights: Tensor | None) -> Tensor:
    """Scales [M, G, 1] of least squared error, weighted by the root of weights where these are given: for each share of
    the largest number the codes, and for these the scale that suits them best. The sign makes -8, the code without a
    counterpart, that of the largest number."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # torch.aminmax is nine times slower
    largest = _check_finite(torch.where(-low > high, low, high))
    if weights is None:
        scale = scales.search_symmetric(groups.flatten(0, 1), -8, 7).scale.view_as(largest)
        return torch.where(scale.abs() < _SMALLEST, _SMALLEST, scale)
    largest = torch.where(largest.abs() < _SMALLEST, _SMALLEST, largest)
    inverse, best, weights = -8 / largest, torch.zeros_like(largest), weights.sqrt()
    scale = largest / -8
    codes, work = torch.empty_like(groups), torch.empty_like(groups)
    target = groups * weights
    for share in SHARES:
        torch.mul(groups, inverse / share, out=codes).round_().clamp_(-8, 7)
        product = torch.mul(codes, target, out=work).sum(-1, keepdim=True)
        norm = torch.mul(codes, codes, out=work).mul_(weights).sum(-1, keepdim=True)
        fitted = product / norm
        gain = product * fitted  # what this scale takes off the squared error of codes that are all zero
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale


def _check_finite(largest: Tensor) -> Tensor:
    if not bool((largest * 0).sum() == 0):  # also of NaN, which the largest of a group keeps
        raise QuantError("NaN or infinite numbers cannot be quantised")
    return largest
