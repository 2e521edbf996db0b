"""The three loss terms and how an algorithm weighs them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keye.train.algorithms.sft import SupervisedFineTuning
from keye.train.losses import Samples, TokenWeights, token_loss


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
