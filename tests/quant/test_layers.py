"""Layers with quantised matrices compute what plain layers compute with the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from keye.ops import registry
from keye.ops.elementwise import swiglu
from keye.ops.quantized import QuantFormat, QuantTensor
from keye.quant.layers import QuantEmbedding, QuantExperts, QuantizedWeight, QuantLinear, pack_weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


INT4, FP8 = QuantFormat("int4", 32), QuantFormat("fp8")


def random_weight(*shape: int, form: QuantFormat = INT4, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    tensor = QuantTensor.empty(form, shape)
    tensor.codes.view(torch.uint8).copy_(torch.randint(0, 120, tensor.codes.shape))
    for part in (tensor.scales, tensor.minima):
        if part is not None:
            part.copy_(torch.rand(part.shape))
    return QuantizedWeight.wrap(tensor, dtype)


@pytest.mark.parametrize("form", [INT4, FP8], ids=str)
def test_linear(form: QuantFormat) -> None:
    weight, x = random_weight(8, 50, form=form), torch.randn(2, 3, 50)
    layer = QuantLinear(weight, nn.Parameter(torch.randn(8)))
    expected = nn.functional.linear(x, weight.tensor.dequantize(), layer.bias).detach()
    torch.testing.assert_close(layer(x).detach(), expected, rtol=0.02, atol=0.02 * float(expected.std()))
    assert set(layer.state_dict()) == {"weight.codes", "weight.scales", "bias"}
    assert layer(x[0, 0]).shape == (8,) and layer(x[:0]).shape == (0, 3, 8)


def test_embedding() -> None:
    layer, ids = QuantEmbedding(random_weight(10, 48, dtype=torch.bfloat16)), torch.tensor([[3, 9], [0, 3]])
    assert torch.equal(layer(ids), layer.weight.tensor.dequantize(torch.bfloat16)[ids])


def test_experts() -> None:
    layer, sizes = QuantExperts(random_weight(2, 12, 32), random_weight(2, 32, 6)), [2, 1]
    x = torch.randn(3, 32)
    up, down = layer.gate_up_proj.tensor.dequantize(), layer.down_proj.tensor.dequantize()
    expected = torch.cat([swiglu(x[:2] @ up[0].T) @ down[0].T, swiglu(x[2:] @ up[1].T) @ down[1].T])
    torch.testing.assert_close(layer(x, sizes), expected, rtol=0.03, atol=0.03 * float(expected.std()))


@pytest.mark.parametrize("form", [INT4, FP8], ids=str)
def test_conversions_change_the_activations_alone(form: QuantFormat) -> None:
    layer = QuantLinear(random_weight(4, 32, form=form), nn.Parameter(torch.ones(4)))
    before: dict[str, Any] = copy.deepcopy(layer.state_dict())
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    for name in ("codes", "scales"):
        now = layer.state_dict()[f"weight.{name}"]
        assert now.dtype == before[f"weight.{name}"].dtype
        assert torch.equal(now.view(torch.uint8), before[f"weight.{name}"].view(torch.uint8))


def test_a_plain_layer_is_replaced_on_the_meta_device() -> None:
    with torch.device("meta"):
        plain = nn.Linear(64, 8)
    layer = QuantLinear.like(plain, INT4)
    assert layer.weight.device.type == "meta" and layer.bias is plain.bias
    layer = layer.to_empty(device="cpu")
    assert layer.weight.codes.shape == (8, 32) and layer.weight.device.type == "cpu"


@pytest.fixture
def core() -> None:
    if registry.pack_weight(random_weight(8, 64).tensor) is None:
        pytest.skip("no compiled core here")


@pytest.mark.usefixtures("core")
def test_packed_layers_keep_their_state_and_compute_the_same() -> None:
    linear = QuantLinear(random_weight(40, 96), nn.Parameter(torch.randn(40)))
    experts = QuantExperts(random_weight(3, 128, 96), random_weight(3, 96, 64))
    model = nn.ModuleDict({"linear": linear, "experts": experts, "table": QuantEmbedding(random_weight(9, 96))})
    before: dict[str, Any] = copy.deepcopy(model.state_dict())
    x, sizes = torch.randn(5, 96), [2, 0, 3]
    with torch.no_grad():
        plain = linear(x), experts(x, sizes)
        pack_weights(model)
        assert linear.weight.packed is not None and model["table"].weight.packed is None
        for ours, wanted in zip((linear(x), experts(x, sizes)), plain, strict=True):
            assert (ours - wanted).norm() < 0.05 * wanted.norm()
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    x.requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None
    assert model.to("meta")["linear"].weight.device.type == "meta"


@pytest.mark.usefixtures("core")
def test_a_packed_weight_takes_another_state() -> None:
    layer, other = QuantLinear(random_weight(40, 96)), QuantLinear(random_weight(40, 96))
    layer.weight.pack()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight.tensor.codes, other.weight.tensor.codes)


@pytest.mark.usefixtures("core")
def test_experts_of_tokens_are_mixed_when_packed() -> None:
    experts = QuantExperts(random_weight(4, 128, 96), random_weight(4, 96, 64))
    x, weights, chosen = torch.randn(3, 96), torch.ones(3, 1), torch.tensor([[1], [0], [3]])
    assert experts.mix(x, weights, chosen) is None
    order = [1, 0, 2]
    wanted = experts(x[order], [1, 1, 0, 1])[order]
    pack_weights(experts)
    mixed = experts.mix(x, weights, chosen)
    assert mixed is not None and (mixed - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("form", [INT4, QuantFormat("int8"), QuantFormat("int4", 32, has_minimum=True)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_tiles_hold_the_numbers_of_a_matrix(form: QuantFormat, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.quant.layers.TILE_NUMBERS", 64 * 96)
    weight, experts = random_weight(150, 96, form=form), random_weight(3, 100, 96, form=form)
    wanted = [weight.tensor.dequantize(), experts.tensor[1].dequantize()]
    if packed:
        weight.pack()
        experts.pack()
    for tiles, numbers in zip((weight.tiles(), experts.tiles(1)), wanted, strict=True):
        rows, parts = zip(*tiles, strict=True)
        assert [part.shape[0] for part in parts[:-1]] == [64] * (len(parts) - 1) and rows[-1].stop == len(numbers)
        assert torch.equal(torch.cat(parts), numbers)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("tile", [32 * 96, 1 << 22], ids=["tiles", "single tile"])
def test_gradients_are_those_of_the_numbers(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a backward pass the same kernels compute the products, to the last bit."""
    monkeypatch.setattr("keye.quant.layers.TILE_NUMBERS", tile)
    bias = nn.Parameter(torch.randn(100))
    linear, experts = (
        QuantLinear(random_weight(100, 96), bias),
        QuantExperts(random_weight(3, 128, 96), random_weight(3, 96, 64)),
    )
    numbers, ups = linear.weight.tensor.dequantize(), experts.gate_up_proj.tensor.dequantize()
    pack_weights(nn.ModuleList([linear, experts]))
    x, grad, sizes = torch.randn(5, 96), torch.randn(5, 100), [3, 0, 2]
    with torch.no_grad():
        expected = linear(x), experts.project_up(x, sizes)
    x.requires_grad_()
    for frozen in (False, True):
        bias.requires_grad_(not frozen)
        y = linear(x)
        assert torch.equal(y, expected[0])
        (dx,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(dx, grad @ numbers, atol=1e-4, rtol=1e-5)
    up = experts.project_up(x, sizes)
    assert torch.equal(up, expected[1])
    grad = torch.randn(5, 128)
    (dx,) = torch.autograd.grad(up, x, grad)
    torch.testing.assert_close(dx, torch.cat((grad[:3] @ ups[0], grad[3:] @ ups[2])), atol=1e-4, rtol=1e-5)
    bias.requires_grad_()
    linear(x.detach()).sum().backward()  # where the activations have no gradient
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((100,), 5.0))


@pytest.mark.usefixtures("core")
def test_gradients_of_mixed_experts() -> None:
    """Tokens and weights get those of plain experts with the same numbers, but for the rounding of activations."""
    experts = QuantExperts(random_weight(4, 128, 96), random_weight(4, 96, 64))
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert weight.scales is not None
        weight.scales /= 8
    ups, downs = experts.gate_up_proj.tensor.dequantize(), experts.down_proj.tensor.dequantize()
    pack_weights(experts)
    x, weights, grad = torch.randn(20, 96), torch.rand(20, 2), torch.randn(20, 96)
    chosen = torch.rand(20, 3).topk(2, dim=1).indices  # never the last expert
    with torch.no_grad():
        expected = experts.mix(x, weights, chosen)
    x.requires_grad_()
    weights.requires_grad_()
    mixed = experts.mix(x, weights, chosen)
    assert mixed is not None and expected is not None and torch.equal(mixed, expected)
    inner = swiglu(torch.einsum("tk,tnmk->tnm", x, ups[chosen]))
    plain = (torch.einsum("tnk,tnmk->tnm", inner, downs[chosen]) * weights.unsqueeze(2)).sum(1)
    ours, wanted = (torch.autograd.grad(y, (x, weights), grad) for y in (mixed, plain))
    for own, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
