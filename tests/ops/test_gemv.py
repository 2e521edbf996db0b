"""Products of few rows by the compiled core against torch, in every variant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keye.ops import elementwise
from keye.ops.cpu import gemv
from keye.ops.cpu.backend import CpuBackend

#: Of outputs of about 1: bfloat16 keeps 8 bits, and sums round otherwise.
ROUNDING = 2**-7


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def near(ours: Tensor, wanted: Tensor) -> bool:
    return bool(((ours.float() - wanted.float()).abs() <= ROUNDING * (1 + wanted.float().abs())).all())


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 32), (13, 96), (300, 2048)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows_times_a_matrix_are_those_of_torch(backend: CpuBackend, rows, outputs, columns, has_bias):
    library = backend.library()
    x, weight = numbers(rows, columns, seed=1), numbers(outputs, columns, seed=2, scale=columns**-0.5)
    bias = numbers(outputs, seed=3) if has_bias else None
    with torch.inference_mode():
        ours = gemv.linear(library, x, weight, bias)
        assert near(ours, torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()))
        exact = gemv.linear(library, x, weight, bias, torch.float32)
        assert torch.equal(exact.bfloat16(), ours)
        assert (
            exact - torch.nn.functional.linear(x.double(), weight.double()) - (0 if bias is None else bias)
        ).abs().max() < 1e-5
        for row in range(rows):
            assert torch.equal(gemv.linear(library, x[row : row + 1], weight, bias), ours[row : row + 1])


def mix_by_torch(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert by expert with torch's products and roundings."""
    parts = torch.empty(*chosen.shape, x.shape[1], dtype=x.dtype)
    for t, k in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
        e = int(chosen[t, k])
        parts[t, k] = elementwise.swiglu(x[t] @ gate_up[e]) @ down[e]
    return elementwise.weighted_sum(parts, weights.to(x.dtype))


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (5, 3), (40, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_few_tokens_through_experts_are_those_of_torch(backend: CpuBackend, tokens, top_k, threads):
    width, inner, count = 192, 160, 6
    x = numbers(tokens, width, seed=4)
    gate_up = numbers(count, 2 * inner, width, seed=5, scale=width**-0.5).mT
    down = numbers(count, width, inner, seed=6, scale=inner**-0.5).mT
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(7))
    weights, chosen = scores.topk(top_k, dim=-1)
    torch.set_num_threads(threads)
    ours = gemv.mix_experts(backend.library(), x, weights, chosen, gate_up, down)
    assert near(ours, mix_by_torch(x, weights, chosen, gate_up, down))
    last = slice(tokens - 1, tokens)
    alone = gemv.mix_experts(backend.library(), x[last], weights[last], chosen[last], gate_up, down)
    assert torch.equal(alone, ours[last]), "a token does not depend on the others of the step"


@pytest.mark.parametrize("change", [
    {"rows": 9}, {"dtype": torch.float32}, {"columns": 2040}, {"columns": 992}, {"outputs": 8}, {"rows": 0},
])  # fmt: skip
def test_what_is_left_to_torch(change):
    wanted = {"rows": 8, "columns": 2048, "outputs": 256, "dtype": torch.bfloat16} | change
    x = torch.zeros(wanted["rows"], wanted["columns"], dtype=wanted["dtype"])
    weight = torch.zeros(wanted["outputs"], wanted["columns"], dtype=wanted["dtype"])
    with torch.inference_mode():
        assert not gemv.takes_linear(x, weight)
        assert gemv.takes_linear(torch.zeros(8, 2048).bfloat16(), torch.zeros(256, 2048).bfloat16())
    assert not gemv.takes_linear(torch.zeros(8, 2048).bfloat16(), torch.zeros(256, 2048).bfloat16())


def test_operands_that_do_not_fit_are_left_to_torch() -> None:
    """Which says so; the core would read and write beyond their ends."""
    weight, experts = numbers(512, 1024, seed=1), numbers(2, 1024, 512, seed=2)
    chosen = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        assert gemv.takes_linear(numbers(1, 1024, seed=3), weight)
        assert not gemv.takes_linear(numbers(1, 2048, seed=3), weight)
        assert not gemv.takes_linear(numbers(1, 1024, seed=3).to("meta"), weight)
        gate_up, down = experts.mT, numbers(2, 512, 512, seed=4).mT
        assert gemv.takes_experts(numbers(1, 512, seed=3), chosen, gate_up, down)
        assert not gemv.takes_experts(numbers(1, 256, seed=3), chosen, gate_up, down)
        assert not gemv.takes_experts(numbers(1, 512, seed=3).to("meta"), chosen, gate_up, down)
