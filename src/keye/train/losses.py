"""The three loss terms of a token, and how an algorithm weighs them.

An algorithm (`keye.train.algorithms`) decides how much each learnt token counts in each term; what the terms are is
decided here, so that neither the loop nor a recipe knows the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The n learnt tokens of a step: `log_probs` float32 [n] that the model gives them now, without gradient, and
    `reference` float32 [n] that a reference model gives them, where the batch has it."""

    log_probs: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class TokenWeights:
    """Weights float32 [n] of the tokens in each term, None without it. The loss is a sum: weights of 1 / n, a mean."""

    cross_entropy: Tensor | None = None
    policy_gradient: Tensor | None = None
    reference_kl: Tensor | None = None


class Algorithm(Protocol):
    """Turns samples into weights; `weigh` may read what the algorithm was made with, such as rewards."""

    def weigh(self, samples: Samples) -> TokenWeights:
        """The weights of one step."""


def token_loss(logits: Tensor, targets: Tensor, algorithm: Algorithm, reference: Tensor | None = None) -> Tensor:
    """The loss of `logits` float32 [n, V] for tokens `targets` int64 [n], with log p the model's log-probability:

    cross entropy: -log p. Policy gradient: -p / p without gradient, whose gradient is that of -log p: clipping and
    importance ratios belong to the weight. KL to the reference: r / p - log(r / p) - 1, an unbiased estimate for tokens
    sampled from p that is never negative.
    """
    surprise = F.cross_entropy(logits, targets, reduction="none")
    weights = algorithm.weigh(Samples(-surprise.detach(), reference))
    terms = []
    if weights.cross_entropy is not None:
        terms.append(weights.cross_entropy * surprise)
    if weights.policy_gradient is not None:
        terms.append(-weights.policy_gradient * (surprise.detach() - surprise).exp())
    if weights.reference_kl is not None:
        assert reference is not None, "the KL to a reference needs the reference's log-probabilities"
        ratio = reference + surprise
        terms.append(weights.reference_kl * (ratio.exp() - ratio - 1))
    return sum(terms[1:], terms[0]).sum()
