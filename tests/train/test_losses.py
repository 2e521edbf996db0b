"""Losses of tokens, routers and pictures against naive versions, and how an algorithm weighs terms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keye.train import losses
from keye.train.algorithms.sft import SupervisedFineTuning
from keye.train.losses import (
    Samples,
    TokenWeights,
    load_balance,
    router_z,
    siglip_loss,
    token_log_probs,
    token_loss,
)  # fmt: skip


@dataclass
class Fixed:
    """An algorithm with the same weights at each step; keeps what it was given."""

    weights: TokenWeights
    samples: Samples | None = None

    def weigh(self, samples: Samples) -> TokenWeights:
        self.samples = samples
        return self.weights


def random_logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator).requires_grad_()
    targets = torch.randint(11, (6,), generator=generator)
    return logits, targets, logits.detach().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def test_supervised_fine_tuning_is_the_mean_cross_entropy() -> None:
    logits, targets, _ = random_logits()
    loss, expected = token_loss(logits, targets, SupervisedFineTuning()), F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
    assert torch.equal(*gradients)


def test_the_algorithm_sees_log_probabilities_without_gradient() -> None:
    logits, targets, log_probs = random_logits()
    algorithm = Fixed(TokenWeights(cross_entropy=torch.ones(6)))
    token_loss(logits, targets, algorithm)
    assert algorithm.samples is not None and not algorithm.samples.log_probs.requires_grad
    torch.testing.assert_close(algorithm.samples.log_probs, log_probs)


def test_the_policy_gradient_is_the_weighted_gradient_of_log_probabilities() -> None:
    logits, targets, _ = random_logits()
    advantages = torch.linspace(-1, 1, 6)
    loss = token_loss(logits, targets, Fixed(TokenWeights(policy_gradient=advantages)))
    expected = (advantages * F.cross_entropy(logits, targets, reduction="none")).sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_the_divergence_from_a_reference() -> None:
    logits, targets, log_probs = random_logits()
    algorithm = Fixed(TokenWeights(reference_kl=torch.ones(6)))
    assert float(token_loss(logits, targets, algorithm, log_probs).detach()) == pytest.approx(0, abs=1e-5)
    reference = log_probs + 0.3
    ratio = (reference - log_probs).exp()
    expected = (ratio - ratio.log() - 1).sum()
    torch.testing.assert_close(token_loss(logits, targets, algorithm, reference).detach(), expected)


def test_terms_add_up() -> None:
    logits, targets, log_probs = random_logits()
    weights, reference = torch.rand(6), log_probs - 0.2
    terms = [
        TokenWeights(cross_entropy=weights),
        TokenWeights(policy_gradient=weights),
        TokenWeights(None, None, weights),
    ]
    parts = [token_loss(logits, targets, Fixed(term), reference) for term in terms]
    torch.testing.assert_close(
        token_loss(logits, targets, Fixed(TokenWeights(weights, weights, weights)), reference), torch.stack(parts).sum()
    )


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("most", [1 << 25, 24])
def test_log_probabilities_in_parts_are_those_of_all_logits(monkeypatch, most: int, width: int) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS", most)
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(5, 11, bias=False)
    hidden = torch.randn(7, 5, generator=generator)
    ids = torch.randint(11, (7, width) if width else (7,), generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    results = []
    for project in ("parts", "naive"):
        x = hidden.clone().requires_grad_()
        head.weight.grad = None
        if project == "parts":
            values = token_log_probs(head, x, ids)
        else:
            values = head(x).log_softmax(-1).gather(1, ids.view(7, -1)).view(ids.shape)
        (weights * values).sum().backward()
        results.append((values.detach(), x.grad, head.weight.grad))
    torch.testing.assert_close(*results)


def test_logits_in_parts_are_never_held_together(monkeypatch) -> None:
    monkeypatch.setattr(losses, "MAX_LOGITS", 1 << 12)
    head, largest = torch.nn.Linear(4, 256, bias=False), []

    def project(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        largest.append(logits.numel())
        return logits

    hidden = torch.randn(100, 4, requires_grad=True)
    token_log_probs(project, hidden, torch.arange(100)).sum().backward()
    assert max(largest) <= 1 << 12
    assert hidden.grad is not None and bool((hidden.grad != 0).any(1).all())


def test_no_tokens_are_a_loss_of_zero_with_a_gradient() -> None:
    hidden = torch.randn(0, 5, requires_grad=True)
    values = token_log_probs(torch.nn.Linear(5, 11), hidden, torch.zeros(0, dtype=torch.int64))
    values.sum().backward()
    assert values.shape == (0,)


def test_the_loss_of_load_is_least_for_equal_use() -> None:
    logits = torch.randn(12, 4)
    chosen = logits.topk(2).indices
    naive = 4 * sum(
        float((chosen == expert).float().sum() / 24) * float(logits.softmax(-1)[:, expert].mean())
        for expert in range(4)
    )
    assert float(load_balance(logits, chosen)) == pytest.approx(naive)
    even = torch.zeros(4, 4)
    assert float(load_balance(even, torch.arange(4).view(4, 1))) == pytest.approx(1.0)
    crowded = torch.tensor([[9.0, 0, 0, 0]] * 4)
    assert float(load_balance(crowded, torch.zeros(4, 1, dtype=torch.int64))) > 3.9


def test_the_z_loss_is_the_mean_square_of_log_partition() -> None:
    logits = torch.randn(12, 4)
    naive = sum(float(row.exp().sum().log()) ** 2 for row in logits) / 12
    assert float(router_z(logits)) == pytest.approx(naive, rel=1e-5)


def test_the_sigmoid_loss_of_pictures_and_captions() -> None:
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    scale, bias = torch.tensor(2.0), torch.tensor(-3.0)
    naive = 0.0
    for i in range(5):
        for j in range(5):
            similarity = torch.cosine_similarity(images[i], texts[j], dim=0)
            logit = similarity * scale.exp() + bias
            naive -= float(F.logsigmoid(logit if i == j else -logit)) / 5
    assert float(siglip_loss(images, texts, scale, bias)) == pytest.approx(naive, rel=1e-5)
    assert float(siglip_loss(images, 2 * images, scale, bias)) < naive
