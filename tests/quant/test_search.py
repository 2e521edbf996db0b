"""Codes and scales: how far numbers move, and what the search of scales gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keye.ops.quantized import QuantFormat, QuantTensor
from keye.quant.search import Loss, QuantError, quantize, quantize_into

INT4 = QuantFormat("int4", 64)


def relative(x: Tensor, tensor: QuantTensor, weights: Tensor | None = None) -> float:
    weights = torch.ones(x.shape[-1]) if weights is None else weights
    error = ((tensor.dequantize() - x.float()).square() * weights).sum() / (x.float().square() * weights).sum()
    return float(error.sqrt())


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(70, 300)  # the last group of 64 has 44 numbers


@pytest.mark.parametrize(("form", "most"), [
    (INT4, 0.091), (QuantFormat("int4", 32), 0.083), (QuantFormat("int4", 128), 0.104), (QuantFormat("int8"), 0.0075),
    (QuantFormat("int8", 64), 0.0061), (QuantFormat("fp8"), 0.028), (QuantFormat("fp8", 128, rows=128), 0.028),
], ids=str)  # fmt: skip
def test_errors_of_normal_numbers(x: Tensor, form: QuantFormat, most: float) -> None:
    out = QuantTensor.empty(form, tuple(x.shape))
    quantize_into(out, x, loss=(loss := Loss()))
    assert relative(x, out) == pytest.approx(loss.relative, rel=1e-4) and loss.numbers == x.numel()
    assert 0.9 * most < loss.relative < most


def test_the_search_is_close_to_trying_every_scale(x: Tensor) -> None:
    groups = x[:, :256].unflatten(1, (-1, 64))
    largest = groups.abs().amax(-1, keepdim=True)
    tries = [largest * sign / 8 * share / 100 for share in range(60, 120) for sign in (1, -1)]
    errors = [((groups / s).round().clamp(-8, 7) * s - groups).square().sum(-1) for s in tries]
    best = torch.stack(errors).amin(0).sum() / groups.square().sum()
    assert relative(x[:, :256], quantize(x[:, :256], INT4)) < 1.01 * float(best.sqrt())


def test_weights_of_inputs_move_the_error_to_those_that_count_less(x: Tensor) -> None:
    weights = torch.rand(300) ** 6
    plain, aware = quantize(x, INT4), quantize(x, INT4, weights)
    assert relative(x, aware, weights) < 0.93 * relative(x, plain, weights)
    assert relative(x, aware) > relative(x, plain)
    quantize_into(aware, x, weights, loss := Loss())
    assert loss.weighted == pytest.approx(relative(x, aware, weights), rel=1e-4)


@pytest.mark.parametrize("form", [INT4, QuantFormat("int8"), QuantFormat("fp8")], ids=str)
def test_numbers_of_any_size(form: QuantFormat) -> None:
    for size in (0.0, 1e-30, 1e-4, 1e4, 1e30):
        x = torch.randn(4, 128) * size
        x[2] = 0
        y = quantize(x, form).dequantize()
        assert y.isfinite().all() and not y[2].any()
        assert (y - x).norm() <= 0.12 * x.norm() or size == 1e-30


@pytest.mark.parametrize("form", [INT4, QuantFormat("int8"), QuantFormat("fp8")], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_refused(form: QuantFormat, bad: float) -> None:
    x = torch.randn(4, 64)
    x[3, 5] = bad
    with pytest.raises(QuantError, match="NaN or infinite"):
        quantize(x, form)


def test_experts_are_matrices_of_their_own(x: Tensor) -> None:
    stacked = torch.stack([x, 3 * x])
    both = quantize(stacked, INT4)
    assert torch.equal(both[1].codes, quantize(3 * x, INT4).codes) and both.codes.shape == (2, 70, 150)
