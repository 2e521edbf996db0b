"""On-policy distillation by sampled tokens: reverse KL of the student from its teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keye.train.losses import Samples, TokenWeights


@dataclass(frozen=True)
class OnPolicyDistillation:
    """The tokens y of replies that the student sampled count log p_T(y) - log p(y) in the policy gradient, whose
    expectation is minus the gradient of KL(p || p_T); the reference is the teacher. `weights` float32 [n] are how much
    each token counts."""

    weights: Tensor

    def weigh(self, samples: Samples) -> TokenWeights:
        assert samples.reference is not None
        return TokenWeights(policy_gradient=self.weights * (samples.reference - samples.log_probs))
