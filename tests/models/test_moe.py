"""Grouped experts equal one token and one expert at a time, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keye.config import model_config_from_dict
from keye.models.moe import ROW_MULTIPLE, Combine, Dispatch, GroupedProduct, MoE, lay_out_for_decoding, plan_rows
from keye.ops.registry import backends


def naive(moe: MoE, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    outputs = []
    for token in x:
        weights, chosen = F.linear(token, moe.gate.weight).softmax(-1).topk(moe.gate.top_k)
        if moe.gate.normalise:
            weights = weights / weights.sum()
        parts = []
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            gate, up = (token @ moe.experts.gate_up_proj[e]).chunk(2)
            parts.append(weight * ((F.silu(gate) * up) @ moe.experts.down_proj[e]))
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)


def make_moe(raw: dict[str, Any], **overrides: Any) -> MoE:
    moe = MoE(model_config_from_dict({**raw, **overrides}).text)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return moe


def rows_are_padded(tokens: int, moe: MoE) -> bool:
    return tokens * moe.gate.top_k >= ROW_MULTIPLE * moe.gate.out_features


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_equals_the_naive_loop(tokens: int, normalise: bool, raw_config: dict[str, Any]) -> None:
    moe = make_moe(raw_config, norm_topk_prob=normalise, num_experts_per_tok=3)
    assert rows_are_padded(tokens, moe) == (tokens == 300), "both row layouts are tested"
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(2))

    def run(function: Any) -> tuple[Tensor, list[Tensor]]:
        out = function()
        return out, list(torch.autograd.grad((out * target).sum(), [x, *moe.parameters()]))

    got, got_grads = run(lambda: moe(x)[0])
    want, want_grads = run(lambda: naive(moe, x))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_gradients_by_finite_differences(raw_config: dict[str, Any]) -> None:
    """Dispatch, products and combination have their own backward passes; the rest of the layer is torch's."""
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1]])
    token_of_row, row_of_slot, sizes = plan_rows(chosen, 4)
    assert sizes == [2, 2, 2, 0]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: Dispatch.apply(t, token_of_row, row_of_slot), (x,))
    w, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 5, 3)))

    def weighted_sum(y: Tensor, weights: Tensor) -> Tensor:
        return (y * weights.unsqueeze(-1)).sum(1)

    assert torch.autograd.gradcheck(lambda a, b: Combine.apply(a, b, row_of_slot, token_of_row, weighted_sum), (y, w))
    assert torch.autograd.gradcheck(lambda a, b: GroupedProduct.apply(a, b, sizes), (y, up))


def test_router_is_float32_and_reports_its_choice(raw_config: dict[str, Any]) -> None:
    moe = make_moe(raw_config).bfloat16()
    out, logits, chosen = moe(torch.randn(7, 48).bfloat16())
    assert out.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.equal(chosen, logits.softmax(-1).topk(2).indices)


def test_one_expert_may_take_every_token(raw_config: dict[str, Any]) -> None:
    moe = make_moe(raw_config, num_experts_per_tok=1)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[5] = 1.0
        x = torch.rand(600, 48)
        out, _, chosen = moe(x)
        assert (chosen == 5).all()
        torch.testing.assert_close(out, naive(moe, x), rtol=1e-4, atol=1e-5)


def test_large_experts_meet_few_tokens_in_the_compiled_core(raw_config: dict[str, Any]) -> None:
    text = model_config_from_dict({**raw_config, "hidden_size": 1024, "moe_intermediate_size": 256}).text
    with torch.device("meta"):
        moe = MoE(text).bfloat16()
        lay_out_for_decoding(moe, "cpu", torch.bfloat16)
    moe, generator = moe.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.copy_(0.03 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 1024, generator=generator).bfloat16()
    with torch.inference_mode():
        if moe.experts.mix(x, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)) is None:
            pytest.skip("the compiled core cannot be used here")
        ours = moe(x)[0]
        with backends.using("reference"):
            wanted = moe(x)[0]
    assert not torch.equal(ours, torch.zeros_like(ours))
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-3)
    moe(x.requires_grad_())[0].sum().backward()
    assert x.grad is not None and moe.experts.down_proj.grad is not None
