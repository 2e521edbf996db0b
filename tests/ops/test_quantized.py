"""Formats of quantised matrices: layout, sizes, and products by definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.ops.quantized import (
    QuantFormat,
    QuantTensor,
    exact_matmul,
    grouped_matmul,
    integer_matmul,
    matmul,
    pack_int4,
    quantize_activations,
    round_activations,
    scaled_matmul,
    takes_scaled,
    unpack_int4,
)

FORMATS = (
    QuantFormat("int4", 32), QuantFormat("int4", 64), QuantFormat("int4"), QuantFormat("int4", 32, has_minimum=True),
    QuantFormat("int8"), QuantFormat("int8", 32), QuantFormat("int8", 16, has_minimum=True),
    QuantFormat("fp8"), QuantFormat("fp8", 16, rows=16, scale_dtype=torch.float32),
)  # fmt: skip


def fill(form: QuantFormat, *shape: int) -> QuantTensor:
    """Random codes and scales."""
    tensor = QuantTensor.empty(form, shape)
    if form.kind == "fp8":
        tensor.codes.copy_(torch.randn(tensor.codes.shape).to(torch.float8_e4m3fn))
    else:
        low, high = (-127, 128) if form.kind == "int8" else (0, 256)
        tensor.codes.copy_(torch.randint(low, high, tensor.codes.shape))
    tensor.scales.copy_(torch.rand(tensor.scales.shape) + 0.5)
    if tensor.minima is not None:
        tensor.minima.copy_(torch.randn(tensor.minima.shape))
    return tensor


def by_hand(tensor: QuantTensor) -> Tensor:
    """A matrix number by number, as the documentation of the format says."""
    form, (M, K) = tensor.format, tensor.shape
    out = torch.empty(M, K)
    for m in range(M):
        for k in range(K):
            place = (m // form.rows, k // (form.group or K))
            if form.kind == "int4":
                code = float(int(tensor.codes[m, k // 2]) >> 4 * (k % 2) & 15) - (0 if form.has_minimum else 8)
            else:
                code = float(tensor.codes[m, k])
            out[m, k] = code * float(tensor.scales[place])
            if tensor.minima is not None:
                out[m, k] += float(tensor.minima[place])
    return out


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_numbers_are_those_of_the_documented_layout(form: QuantFormat) -> None:
    tensor = fill(form, 9, 77)  # the last group, byte and block are short
    assert torch.equal(tensor.dequantize(), by_hand(tensor))
    buffers = [t for t in (tensor.codes, tensor.scales, tensor.minima) if t is not None]
    assert tensor.nbytes == form.nbytes((9, 77)) == sum(t.nbytes for t in buffers)
    assert QuantFormat.from_dict(form.to_dict()) == form


def test_halves_of_a_byte() -> None:
    assert pack_int4(torch.tensor([1, 2, 15])).tolist() == [0x21, 0x0F]
    assert unpack_int4(torch.tensor([0x21, 0x0F], dtype=torch.uint8), 3).tolist() == [1, 2, 15]


def test_activations_keep_the_largest_of_each_group() -> None:
    x = torch.randn(3, 100) * 10 ** torch.arange(-20.0, 10, 10).unsqueeze(1)
    x[1, 64:] = 0
    codes, scales = quantize_activations(x, 64)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scales.shape == (3, 2)
    assert codes[:, :64].abs().amax(1).tolist() == [127] * 3 and not codes[1, 64:].any()
    step = scales.repeat_interleave(64, 1)[:, :100]
    assert ((round_activations(x, 64) - x).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_are_those_of_the_numbers(form: QuantFormat) -> None:
    torch.manual_seed(0)
    weight, x = fill(form, 12, 77), torch.randn(5, 77)
    x64, w64 = x.double(), weight.dequantize(torch.float64)
    expected = (x64 @ w64.T).float()
    near = {"rtol": 1e-5, "atol": 1e-5 * float(expected.std())}
    torch.testing.assert_close(exact_matmul(x, weight), expected, **near)
    torch.testing.assert_close(matmul(x, weight), expected, rtol=0.02, atol=0.02 * float(expected.std()))
    torch.testing.assert_close(integer_matmul(x, weight), (round_activations(x) @ w64.T).float(), **near)
    assert (integer_matmul(x, weight) - expected).norm() < 0.02 * expected.norm()


def test_float8_activations_round_each_row() -> None:
    torch.manual_seed(0)
    weight = fill(QuantFormat("fp8"), 32, 64)
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 3.0, 1e4, 0.0]).unsqueeze(1)
    assert takes_scaled(weight) and not takes_scaled(fill(QuantFormat("fp8"), 32, 77))
    assert not takes_scaled(fill(QuantFormat("fp8", 16), 32, 64))
    expected, out = exact_matmul(x, weight), scaled_matmul(x, weight)
    assert out.shape == (5, 32) and not out[4].any()
    for row in range(4):
        assert (out[row] - expected[row]).norm() < 0.06 * expected[row].norm()


def test_rows_of_experts_meet_their_weights() -> None:
    weight, x, sizes = fill(QuantFormat("int4", 32), 3, 8, 64), torch.randn(7, 64), [4, 0, 3]
    out = grouped_matmul(x, weight, sizes)
    assert torch.equal(out[:4], matmul(x[:4], weight[0])) and torch.equal(out[4:], matmul(x[4:], weight[2]))
    assert grouped_matmul(x[:0], weight, [0, 0, 0]).shape == (0, 8)


@pytest.mark.parametrize("value", [None, {}, {"kind": "int3"}, {"kind": "int4", "group": 0}, {"kind": "int4", "x": 4},
                                   {"kind": "int8", "group": "64"}, {"kind": "fp8", "has_minimum": True}])  # fmt: skip
def test_formats_that_no_version_wrote_are_refused(value: object) -> None:
    with pytest.raises(KeyeError):
        QuantFormat.from_dict(value)


def test_the_factor_of_activations_is_rounded_once() -> None:
    """As documented, 127 / magnitude, which kernels compute: not 127 * (1 / magnitude)."""
    largest = 1 + torch.rand(4096, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([largest, largest * (0.5 / 127 + torch.arange(126) / 127)], dim=1)
    factor = (torch.tensor(127.0).double() / largest.double()).float()
    assert torch.equal(quantize_activations(x, 127)[0].float(), (x * factor).round().clamp(-127, 127))
