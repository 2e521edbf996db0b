"""Supervised fine-tuning: the mean cross entropy of the tokens of given answers."""

from __future__ import annotations

import torch

from keye.train.losses import Samples, TokenWeights


class SupervisedFineTuning:
    """Every token counts the same."""

    def weigh(self, samples: Samples) -> TokenWeights:
        return TokenWeights(cross_entropy=torch.ones_like(samples.log_probs) / samples.log_probs.numel())
