"""Losses over pairs of replies to one prompt, from the log-probabilities that whole replies have.

Legend: w the reply that won, l the one that lost; r = beta * (log p(reply) - log p_ref(reply)), its implied reward, p
the model in training and p_ref the model at the stage's beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Pairs:
    """n pairs: log-probabilities of whole replies float32 [n], by the model (with gradient) and by the reference."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """r_w and r_l, float32 [n] each."""
        return beta * (self.chosen - self.reference_chosen), beta * (self.rejected - self.reference_rejected)


def dpo_loss(pairs: Pairs, beta: float) -> Tensor:
    """-log sigmoid(r_w - r_l) of each pair, float32 [n] (DPO)."""
    chosen, rejected = pairs.rewards(beta)
    return -F.logsigmoid(chosen - rejected)


def bco_loss(pairs: Pairs, beta: float, shift: Tensor | float) -> Tensor:
    """-log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta)) of each pair, float32 [n] (BCO): each reply is good or
    bad by itself, against the mean reward delta = `shift` of replies before."""
    chosen, rejected = pairs.rewards(beta)
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


class RewardShift(nn.Module):
    """The mean reward of all replies seen so far, the delta of BCO; the same in all processes of a run."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, pairs: Pairs, beta: float, counted: Tensor) -> Tensor:
        """Takes the rewards of the pairs of a batch that are `counted`, bool [n], into the mean where it is learnt, and
        returns that, float32."""
        if not torch.is_grad_enabled():
            return self.mean.float()
        rewards = torch.stack(pairs.rewards(beta)).detach().double()[:, counted]
        new = torch.stack((rewards.sum(), torch.full_like(rewards.sum(), rewards.numel())))
        if dist.is_initialized():
            dist.all_reduce(new)
        self.count += new[1]
        self.mean += (new[0] - new[1] * self.mean) / self.count.clamp_min(1)
        return self.mean.float()
