"""Scales of groups of weights: near the best there are, and the compiled core agrees with the definition."""

from __future__ import annotations

import pytest
import torch

from keye.ops import scales
from keye.ops.cpu import build
from keye.ops.cpu import scales as compiled


def error(x, ours, low, high, encode=scales.encode):
    """Squared error of each group."""
    codes = encode(x, ours.scale, ours.minimum, low, high)
    y = (codes.float() + low) * ours.scale[:, None] + (0 if ours.minimum is None else ours.minimum[:, None])
    return (y - x).square().sum(1)


def groups(n):
    x = torch.randn(50, n, generator=torch.Generator().manual_seed(n))
    x[0], x[1, 1:] = 0, 0
    x[2] = x[2].abs() + 3
    x[3] *= 1e-20
    return x


@pytest.mark.parametrize(("low", "high"), [(-4, 3), (-8, 7), (-32, 31)])
def test_symmetric_scales_beat_those_of_the_largest_number(low, high):
    x = groups(32)
    plain = scales.Scales(x.gather(1, x.abs().argmax(1, keepdim=True)).view(-1) / low, None)
    ours = error(x, scales.search_symmetric(x, low, high), low, high)
    assert (ours <= error(x, plain, low, high) * (1 + 1e-5)).all()
    assert ours.sum() < 0.95 * error(x, plain, low, high).sum()


def test_affine_scales_beat_those_of_the_range():
    x = groups(32)
    least = x.amin(1).clamp_max(0)
    ours = scales.search_affine(x, 15)
    plain = scales.Scales((x.amax(1) - least).clamp_min(1e-30) / 15, least)
    assert error(x, ours, 0, 15).sum() < 0.85 * error(x, plain, 0, 15).sum()
    assert (ours.minimum <= 0).all()


def test_a_group_of_equal_numbers_and_one_of_zeros_are_exact():
    x = torch.stack((torch.zeros(16), torch.full((16,), 0.75), torch.full((16,), -3.0)))
    assert error(x, scales.search_symmetric(x, -8, 7), -8, 7).max() < 1e-10
    assert error(x, scales.search_affine(x, 15), 0, 15).max() < 1e-10


@pytest.mark.parametrize("n", [16, 32, 64])
@pytest.mark.parametrize(("low", "high", "affine"), [(-32, 31, False), (-4, 3, False), (0, 15, True), (0, 31, True)])
def test_the_compiled_core_finds_scales_as_good_as_the_definition(n, low, high, affine):
    if build.ready().library is None:
        pytest.skip(build.ready().note)
    x = groups(n)
    core = compiled.ScaleLibrary(build.ready().library)
    wanted = scales.search_affine(x, high) if affine else scales.search_symmetric(x, low, high)
    errors = error(x, core.search(x, low, high, affine=affine), low, high, core.encode)
    theirs = error(x, wanted, low, high)
    torch.testing.assert_close(errors, theirs, rtol=0.05, atol=1e-9)  # sums in another order choose between near equals
    torch.testing.assert_close(errors.sum(), theirs.sum(), rtol=1e-3, atol=0)
