"""Rows of codes by the compiled core against `RowFormat.encode`, in every variant."""

from __future__ import annotations

import pytest
import torch

from keye.ops.cpu.backend import CpuBackend
from keye.ops.kv_blocks import RowFormat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 32), (4, 128), (1, 256)])
def test_int8_rows_are_those_of_the_definition(backend: CpuBackend, dtype, heads, dim):
    x = torch.randn(37, heads, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    x[3], x[4] = 0, x[4] * 1e-4
    form = RowFormat("int8", heads, dim)
    assert torch.equal(backend.encode(form, x), form.encode(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 32), (4, 128)])
def test_int4_rows_have_the_least_error_too(backend: CpuBackend, dtype, heads, dim):
    x = torch.randn(90, heads, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    x[3] = 0
    form = RowFormat("int4", heads, dim)
    ours, wanted = backend.encode(form, x), form.encode(x)
    assert (ours == wanted).all(1).float().mean() > 0.95, "rows differ where two scales are equally good"
    errors = [(form.decode(rows, torch.float32) - x.float()).square().sum((1, 2)) for rows in (ours, wanted)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_not_finite_stays_so(backend: CpuBackend, kind, bad):
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    x[1, 0, 5] = bad
    form = RowFormat(kind, 2, 64)
    finite = form.decode(backend.encode(form, x), torch.float32).isfinite()
    assert not finite[1, 0, 5] and torch.equal(
        finite.all(-1), form.decode(form.encode(x), torch.float32).isfinite().all(-1)
    )


def test_what_is_left_to_the_definition(backend: CpuBackend):
    for form in (RowFormat("fp8", 1, 64), RowFormat("bfloat16", 1, 64), RowFormat("int8", 1, 48)):
        assert backend.encode(form, torch.zeros(1, 1, form.dim)) is None
