"""Compiled element-wise operations equal the plain ones, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from keye.models.keye import KeyeModel
from keye.ops import elementwise
from keye.ops.elementwise import PLAIN, Elementwise, compile_elementwise


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Callable[[], list[Any]], int]] = {
    # name -> (arguments, how many of them are differentiated)
    "rms_norm": (lambda: [randn(40, 32), randn(32), 1e-6], 2),
    "add_rms_norm": (lambda: [randn(40, 32), randn(40, 32), randn(32), 1e-6], 3),
    "swiglu": (lambda: [randn(40, 48)], 1),
    "rotate": (lambda: [randn(40, 4, 16), randn(40, 8).cos(), randn(40, 8).sin()], 1),
    "norm_rotate": (lambda: [randn(40, 4, 16), randn(16), 1e-6, randn(40, 8).cos(), randn(40, 8).sin()], 2),
    "index_query": (lambda: [randn(40, 4, 16), randn(16), 1e-6, randn(40, 8).cos(), randn(40, 8).sin()], 2),
    "index_key": (
        lambda: [randn(40, 1, 16), randn(16), randn(16) + 1, 1e-6, randn(40, 8).cos(), randn(40, 8).sin()],
        3,
    ),
    "weighted_sum": (lambda: [randn(40, 3, 16), randn(40, 3)], 2),
}


def values_and_gradients(function: Callable[..., Any], name: str) -> list[Tensor]:
    make, differentiated = CASES[name]
    arguments = make()
    leaves = [argument.clone().requires_grad_() for argument in arguments[:differentiated]]
    result = function(*leaves, *arguments[differentiated:])
    outputs = list(result) if isinstance(result, tuple) else [result]
    loss = torch.stack([(out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs]).sum()
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves)]


def compiled() -> Elementwise:
    fused = compile_elementwise(torch.device("cpu"))
    assert fused is not None
    return fused


def test_every_entry_is_tested() -> None:
    assert set(CASES) == set(Elementwise._fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_fused_equals_plain(name: str) -> None:
    got = values_and_gradients(getattr(compiled(), name), name)
    want = values_and_gradients(getattr(PLAIN, name), name)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def check_only_one_model_changes(
    elementwise: Elementwise, make_model: Callable[..., KeyeModel], logits_of: Callable[[KeyeModel], Tensor]
) -> None:
    item, other = make_model(0), make_model(0)
    before = logits_of(item)
    other.set_elementwise(elementwise)
    changed = logits_of(other)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, before, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits_of(item), before)
    assert torch.equal(logits_of(make_model(0)), before)
    other.set_elementwise(PLAIN)
    assert torch.equal(logits_of(other), before)


@pytest.fixture
def logits_of(make_prompt: Any, run_chunks: Callable[..., Tensor]) -> Callable[[KeyeModel], Tensor]:
    return lambda model: run_chunks(model, make_prompt(0, 40), [30, 10])


def test_operations_belong_to_one_model(make_model: Any, logits_of: Any) -> None:
    other = PLAIN._replace(rms_norm=lambda x, weight, eps: elementwise.rms_norm(x, weight, eps + 1e-5))
    check_only_one_model_changes(other, make_model, logits_of)


@pytest.mark.slow
def test_one_model_is_compiled_and_another_is_not(make_model: Any, logits_of: Any) -> None:
    check_only_one_model_changes(compiled(), make_model, logits_of)
