"""Norms by the compiled core against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keye.ops.cpu import elementwise as cpu
from keye.ops.elementwise import PLAIN, Elementwise


@pytest.fixture
def small(backend) -> Elementwise:
    return cpu.make(backend.library())


def near(ours: Tensor, wanted: Tensor) -> bool:
    """Equal but for the last bit of a few numbers, which a norm's sum may round otherwise."""
    step = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[wanted.dtype]
    difference = (ours.float() - wanted.float()).abs()
    bound = step * wanted.float().abs().clamp_min(1)
    often = difference.ne(0).float().mean() < 0.1 or wanted.dtype == torch.float32
    return ours.dtype == wanted.dtype and bool((difference <= bound).all()) and bool(often)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 700])
@torch.no_grad()
def test_norms_and_rotations_are_the_plain_ones(small: Elementwise, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    torch.set_num_threads(1 + rows % 2)
    x, delta, weight = (torch.randn(n, 192).to(dtype) for n in (rows, rows, 1))
    weight = weight[0]
    assert near(small.rms_norm(x, weight, 1e-6), PLAIN.rms_norm(x, weight, 1e-6))
    assert all(map(near, small.add_rms_norm(x, delta, weight, 1e-6), PLAIN.add_rms_norm(x, delta, weight, 1e-6)))
    wide = torch.randn(rows, 3 * 64 + 5).to(dtype)
    heads, (cos, sin) = wide[:, : 3 * 64].unflatten(-1, (3, 64)), torch.randn(2, rows, 32)
    norm, bias = torch.randn(2, 64).to(dtype)
    for x in (heads, heads.contiguous()):
        assert near(small.norm_rotate(x, norm, 1e-6, cos, sin), PLAIN.norm_rotate(x, norm, 1e-6, cos, sin))
        assert near(small.index_query(x, norm, 1e-6, cos, sin), PLAIN.index_query(x, norm, 1e-6, cos, sin))
        assert near(small.index_key(x, norm, bias, 1e-6, cos, sin), PLAIN.index_key(x, norm, bias, 1e-6, cos, sin))


def test_what_the_core_does_not_take_is_computed_plainly(best_backend) -> None:
    small = cpu.make(best_backend.library())
    x, weight = torch.randn(3, 20, requires_grad=True), torch.ones(20)
    small.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(small.rms_norm(x, weight, 1e-6), PLAIN.rms_norm(x, weight, 1e-6))
        assert small.rms_norm(x[:0], weight, 1e-6).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", [True, False])
def test_with_gradients_results_are_the_same_and_gradients_the_plain_ones(
    best_backend, dtype: torch.dtype, forward: bool
) -> None:
    small = cpu.make(best_backend.library(), forward=forward)
    torch.manual_seed(0)
    x, delta = torch.randn(2, 9, 4, 64).to(dtype)
    (weight, bias), (cos, sin) = torch.randn(2, 64).to(dtype), torch.randn(2, 9, 32)
    for name, inputs in {
        "rms_norm": (x, weight, 1e-6), "add_rms_norm": (x, delta, weight, 1e-6),
        "norm_rotate": (x, weight, 1e-6, cos, sin), "index_query": (x, weight, 1e-6, cos, sin),
        "index_key": (x, weight, bias, 1e-6, cos, sin), "swiglu": (x,),
    }.items():  # fmt: skip
        gradients, outputs = [], []
        for used in (small, PLAIN):
            leaves = [y.clone() if isinstance(y, Tensor) else y for y in inputs]
            for y, z in zip(leaves, inputs, strict=True):
                if isinstance(y, Tensor):
                    y.requires_grad_(z is not cos and z is not sin)
            out = getattr(used, name)(*leaves)
            outs = out if isinstance(out, tuple) else (out,)
            sum((y.float() ** 2).sum() for y in outs).backward()
            gradients.append([y.grad for y in leaves if isinstance(y, Tensor) and y.requires_grad])
            outputs.append(outs)
        with torch.no_grad():
            again = getattr(small, name)(*inputs)
        for y, z in zip(outputs[0], again if isinstance(again, tuple) else (again,), strict=True):
            assert torch.equal(y, z)
        if not forward:
            assert all(map(torch.equal, *outputs))
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for y, z in zip(*gradients, strict=True):
            assert float((y.float() - z.float()).abs().max()) <= tolerance * float(z.float().abs().max()), name
