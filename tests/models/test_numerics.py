"""Hadamard transform, float8 rounding, rotary embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye.ops.elementwise import rms_norm, rotate
from keye.ops.reference import FP8_MAX, hadamard_transform, inverse_frequencies, quantize_fp8, rope_angles


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 128])
def test_hadamard_equals_the_matrix(dim: int) -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(hadamard_transform(x), x @ matrix * dim**-0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((hadamard_transform(x.requires_grad_()) * x.detach().cos()).sum(), x)
    torch.testing.assert_close(gradient, x.detach().cos() @ matrix.mT * dim**-0.5, rtol=1e-5, atol=1e-5)


def test_hadamard_keeps_dot_products_and_dtype() -> None:
    a, b = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((hadamard_transform(a) * hadamard_transform(b)).sum(-1), (a * b).sum(-1))
    assert hadamard_transform(a.bfloat16()).dtype == torch.bfloat16
    assert hadamard_transform(a.bfloat16()).is_contiguous()  # kernels read it by address
    # vLLM compiles the indexer in one graph.
    compiled = torch.compile(hadamard_transform, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a), hadamard_transform(a))


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_fp8_scales_are_powers_of_two_and_errors_small(seed: int, size: float) -> None:
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(seed)) * size
    values, scale = quantize_fp8(x)
    assert scale.shape == (9, 1)
    assert torch.equal(torch.exp2(scale.log2().round()), scale)
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)
    assert values.abs().max() <= FP8_MAX
    # Half a step: 2**-4 relative for normal values, half of 2**-9 below them.
    allowed = torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.0001
    assert ((values * scale - x).abs() <= allowed).all()


def test_fp8_of_zeros_is_zero() -> None:
    values, scale = quantize_fp8(torch.zeros(2, 16))
    assert values.abs().max() == 0
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_fp8_of_its_own_values_is_exact() -> None:
    values, scale = quantize_fp8(torch.randn(20, 64, generator=torch.Generator().manual_seed(1)))
    again, other = quantize_fp8(values * scale)
    assert torch.equal(again * other, values * scale)


def test_rotation_keeps_length_and_depends_on_distance() -> None:
    q, k = torch.randn(2, 1, 2, 32, generator=torch.Generator().manual_seed(0))
    inv_freq = inverse_frequencies(32, 1e6)

    def dot(first: list[int], second: list[int]) -> torch.Tensor:
        a = rotate(q, *rope_angles(torch.tensor(first).view(3, 1), inv_freq, (4, 6, 6)))
        b = rotate(k, *rope_angles(torch.tensor(second).view(3, 1), inv_freq, (4, 6, 6)))
        torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
        return (a * b).sum(-1)

    torch.testing.assert_close(dot([5, 7, 9], [2, 3, 4]), dot([15, 27, 39], [12, 23, 34]), rtol=1e-4, atol=1e-4)


def test_axes_turn_their_own_section() -> None:
    inv_freq = inverse_frequencies(32, 1e6)
    for axis, part in enumerate((slice(0, 4), slice(4, 10), slice(10, 16))):
        positions = torch.zeros(3, 1)
        positions[axis] = 3
        _, sin = rope_angles(positions, inv_freq, (4, 6, 6))
        turned = sin[0] != 0
        assert turned[part].all()
        assert turned.sum() == part.stop - part.start


def test_rms_norm_keeps_the_dtype() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    want = x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x, torch.ones(16), 1e-6), want)
    assert rms_norm(x.bfloat16(), torch.ones(16), 1e-6).dtype == torch.bfloat16
