"""The optimiser: orthogonal updates, state that survives, gradients that are not numbers."""

import pytest
import torch
from torch import nn

from keye.train.optim import Optimizer, Trained, is_muon_matrix, orthogonalise
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.tiny import tiny_config


def optimizer(model, lr=0.01, **options):
    return Optimizer([Trained(name, p, p.ndim == 2, lr) for name, p in model.named_parameters()], **options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def give_gradients(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (64, 256)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    spread = torch.linspace(0.1, 1.0, min(shape)).diag()
    values = torch.linalg.svdvals(orthogonalise(u @ spread @ v).float())
    assert values.min() > 0.7
    assert values.max() < 1.2


def test_orthogonalising_keeps_the_singular_vectors():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(16, 16))
    v, _ = torch.linalg.qr(torch.randn(16, 16))
    x = u @ torch.diag(torch.linspace(0.5, 2.0, 16)) @ v.T
    turned = u.T @ orthogonalise(x.unsqueeze(0))[0].float() @ v
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 0.1


def test_the_scale_of_a_gradient_does_not_matter_to_muon():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8)
    torch.testing.assert_close(orthogonalise(x), orthogonalise(x * 1000.0), atol=0.02, rtol=0.02)


def test_state_round_trip():
    left, right = network(), network()
    first = optimizer(left)
    for seed in range(3):
        give_gradients(left, seed)
        first.step(1.0)
    second = optimizer(right)
    state = second.state()
    for name, tensor in first.state().items():
        state[name].copy_(tensor)
    second.take_state(state)
    for seed in range(3, 6):
        for model, own in ((left, first), (right, second)):
            give_gradients(model, seed)
            own.step(1.0)
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_are_skipped(bad):
    model = network()
    own = optimizer(model)
    give_gradients(model, 0)
    own.step(1.0)
    before = {name: tensor.clone() for name, tensor in own.state().items()}
    give_gradients(model, 1)
    model[0].weight.grad[0, 0] = bad
    norm = own.step(1.0)
    assert not norm < float("inf")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state().items())


def test_gradients_are_clipped_and_cleared():
    model = network()
    own = optimizer(model, clip=1.0)
    give_gradients(model, 0)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert own.step(1.0) == pytest.approx(float(norm), rel=1e-5)
    # The first moments of AdamW are (1 - beta) of the clipped gradient.
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    torch.testing.assert_close(own.first["0.bias"], gradients[1] * 0.1 / (norm + 1e-6))


def test_a_parameter_without_gradient_stays():
    model = network()
    own = optimizer(model)
    before = model[1].weight.detach().clone()
    torch.manual_seed(0)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    own.step(1.0)
    assert torch.equal(model[1].weight, before)


def test_both_kinds_of_parameter_learn_a_regression():
    torch.manual_seed(0)
    model, target = network(), torch.randn(3, 6)
    own = optimizer(model, lr=0.05, weight_decay=0.0)
    x = torch.randn(256, 6)
    losses = []
    for step in range(200):
        loss = (model(x) - x @ target.T).pow(2).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        own.step(1 - step / 200)
    assert losses[-1] < 0.01 * losses[0]


def test_which_matrices_follow_muon():
    model = fresh_model(tiny_config(), 0)
    chosen = {name for name, parameter in model.named_parameters() if is_muon_matrix(name, parameter)}
    assert "model.layers.0.self_attn.q_proj.weight" in chosen
    assert "model.layers.1.mlp.experts.gate_up_proj" in chosen
    assert "mlp_AR.linear_1.weight" in chosen
    assert "visual.vision_model.encoder.layers.0.mlp.fc1.weight" in chosen
    for part in ("embed", "lm_head", ".mlp.gate.", "sa_indexer", "norm", "bias"):
        assert not any(part in name for name in chosen)


def test_adamw_is_that_of_torch():
    left, right = network(), network()
    own = Optimizer([Trained(name, p, False, 0.01, decay=True) for name, p in left.named_parameters()],
                    betas=(0.9, 0.95), weight_decay=0.1, clip=1e9)  # fmt: skip
    theirs = torch.optim.AdamW(right.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for seed in range(5):
        for model in (left, right):
            give_gradients(model, seed)
        own.step(1.0)
        theirs.step()
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_steps_where_that_of_torch_steps():
    """Momentum, Nesterov's look ahead, decay and scale are equal; the polynomials differ in how near one the singular
    values get."""
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.zeros(24, 16))
    other.data.copy_(weight.data)
    own = Optimizer([Trained("w", weight, True, 0.02)], weight_decay=0.1, clip=1e9)
    theirs = torch.optim.Muon([other], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=10,
                              ns_coefficients=(1.875, -1.25, 0.375), adjust_lr_fn="match_rms_adamw")  # fmt: skip
    begin = weight.detach().clone()
    for seed in range(4):
        torch.manual_seed(seed)
        weight.grad = torch.randn(24, 16)
        other.grad = weight.grad.clone()
        own.step(1.0)
        theirs.step()
    moved, expected = weight.detach() - begin, other.detach() - begin
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
    assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.1)


def test_gradients_of_micro_batches_add_up_in_float32():
    model = network().bfloat16()
    own = optimizer(model)
    for value in [1.0] + [1 / 256] * 63:  # in bfloat16, 1 + 1/256 is 1
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        own.add_gradients()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert own.reduce() == pytest.approx((1 + 63 / 256) * count**0.5, rel=1e-5)
