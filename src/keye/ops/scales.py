"""Scales of groups of weights, searched for the smallest squared error, and the codes that belong to them.

Knows groups `[G, n]` of float32 numbers; knows nothing of file formats. These functions are the definition in plain
torch; `keye.ops.cpu.scales` computes the same in the compiled core.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Candidates of a symmetric scale: the largest number of a group gets a code this many tenths beside the lowest code.
SYMMETRIC_STEPS = range(-9, 10)
#: Candidates of a scale with a minimum: the range of a group covers this many tenths of a code more than there are.
AFFINE_STEPS = range(-10, 11)
#: Times that codes and their best scale are fitted to one another after the search.
FITS = 2
#: Numbers below it are zeros.
TINY = 1e-30


class Scales(NamedTuple):
    """float32 [G]: a number of group g is about `code * scale[g] + minimum[g]`; symmetric scales have no minimum."""

    scale: Tensor
    minimum: Tensor | None


def search_symmetric(x: Tensor, low: int, high: int) -> Scales:
    """The scale of each group for codes low .. high (low < 0 < high); negative where the largest number is positive,
    as there is one code more below zero."""
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    safe = torch.where(peak.abs() > TINY, peak, torch.ones_like(peak))

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        codes = (x * inverse).round_().clamp_(low, high)
        xl, ll = (x * codes).sum(1, keepdim=True), codes.square().sum(1, keepdim=True)
        scale = xl / ll.clamp_min(1)
        return scale * xl, scale

    best, scale = torch.zeros_like(safe), torch.zeros_like(safe)
    for step in SYMMETRIC_STEPS:
        best, scale = _better(best, (scale,), *fit((low + 0.1 * step) / safe))
    for _ in range(FITS):
        best, scale = _better(best, (scale,), *fit(_inverse(scale)))
    return Scales(scale.view(-1), None)


def search_affine(x: Tensor, levels: int) -> Scales:
    """The scale and the minimum, which is never above zero, of each group for codes 0 .. levels."""
    n = x.shape[1]
    least, most = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True)
    width = torch.where(most - least > TINY, most - least, torch.ones_like(most))
    total = x.sum(1, keepdim=True)

    def fit(inverse: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = ((x - offset) * inverse).round_().clamp_(0, levels)
        l, ll, xl = (value.sum(1, keepdim=True) for value in (codes, codes.square(), x * codes))
        spread = n * ll - l.square()  # 0 where all codes are equal
        scale = torch.where(spread > 0, (n * xl - total * l) / spread.clamp_min(1), 0)
        minimum = (total - scale * l) / n
        without = xl / ll.clamp_min(1)
        scale, minimum = torch.where(minimum > 0, without, scale), minimum.clamp_max(0)
        return scale * xl + minimum * total, scale, minimum

    best, scale, minimum = torch.zeros_like(most), torch.zeros_like(most), torch.zeros_like(most)
    for step in AFFINE_STEPS:
        best, scale, minimum = _better(best, (scale, minimum), *fit((levels + 0.1 * step) / width, least))
    for _ in range(FITS):
        best, scale, minimum = _better(best, (scale, minimum), *fit(_inverse(scale), minimum))
    return Scales(scale.view(-1), minimum.view(-1))


def encode(x: Tensor, scale: Tensor, minimum: Tensor | None, low: int, high: int) -> Tensor:
    """uint8 [G, n]: the nearest codes of each group less `low`; a scale of zero takes the code 0."""
    y = x if minimum is None else x - minimum[:, None]
    return ((y * _inverse(scale)[:, None]).clamp_(low, high).round_() - low).to(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1 / scale, 0)


def _better(best: Tensor, values: tuple[Tensor, ...], gain: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The larger gain for each group, and the values that come with it."""
    take = gain > best
    return torch.where(take, gain, best), *(torch.where(take, b, a) for a, b in zip(values, others, strict=True))
