"""The losses of training: of tokens, of routers, of pictures with captions. Those of pairs are in
`keye.train.preferences`.

An algorithm (`keye.train.algorithms`) decides how much each learnt token counts in each of three terms; what the terms
are is decided here, so that neither the loop nor a recipe knows the algorithm. The KL of the indexer is computed with
the attention (`keye.ops.tree`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Logits that are held at once, float32: 128 MiB.
MAX_LOGITS: Final = 1 << 25


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
    """`weighted_loss` of `logits` float32 [n, V] for tokens `targets` int64 [n]."""
    return weighted_loss(-F.cross_entropy(logits, targets, reduction="none"), algorithm, reference)


def weighted_loss(log_probs: Tensor, algorithm: Algorithm, reference: Tensor | None = None) -> Tensor:
    """The loss of tokens with the model's `log_probs` float32 [n], log p:

    cross entropy: -log p. Policy gradient: -p / p without gradient, whose gradient is that of -log p: clipping and
    importance ratios belong to the weight. KL to the reference: r / p - log(r / p) - 1, an unbiased estimate for tokens
    sampled from p that is never negative.
    """
    fixed = log_probs.detach()
    weights = algorithm.weigh(Samples(fixed, reference))
    terms = []
    if weights.cross_entropy is not None:
        terms.append(weights.cross_entropy * -log_probs)
    if weights.policy_gradient is not None:
        terms.append(-weights.policy_gradient * (log_probs - fixed).exp())
    if weights.reference_kl is not None:
        assert reference is not None, "the KL to a reference needs the reference's log-probabilities"
        ratio = reference - log_probs
        terms.append(weights.reference_kl * (ratio.exp() - ratio - 1))
    return sum(terms[1:], terms[0]).sum()


def token_log_probs(project: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor) -> Tensor:
    """log p(id) = logits[id] - log sum_v exp logits[v], float32 in the shape of `ids`, int64 [n] or [n, k].

    `project` turns hidden states [n, d] into logits float32 [n, V]. At most `MAX_LOGITS` of them exist at once: more
    rows are taken in parts, whose logits the backward pass computes again.
    """
    if not len(ids):
        return hidden.float().sum(1) * 0.0 if ids.ndim == 1 else hidden.new_zeros(ids.shape, dtype=torch.float32)
    vocabulary = project(hidden[:1].detach()).shape[1]
    rows = max(1, MAX_LOGITS // vocabulary)

    def choose(hidden: Tensor, ids: Tensor) -> Tensor:
        logits = project(hidden)
        chosen = logits.gather(1, ids.view(len(ids), -1)) - logits.logsumexp(1, keepdim=True)
        return chosen.view(ids.shape)

    if len(ids) <= rows:
        return choose(hidden, ids)
    parts = zip(hidden.split(rows), ids.split(rows), strict=True)
    return torch.cat([checkpoint(choose, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def likeliest_tokens(project: Callable[[Tensor], Tensor], hidden: Tensor, count: int) -> Tensor:
    """The `count` tokens with the highest logits of each row of `hidden` [n, d], int64 [n, count]; see
    `token_log_probs`."""
    vocabulary = project(hidden[:1]).shape[1]
    parts = [project(part).topk(count, dim=1).indices for part in hidden.split(max(1, MAX_LOGITS // vocabulary))]
    return torch.cat(parts)


def overlap_loss(log_probs: Tensor, teacher: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL of n tokens over the set S of candidates that student and teacher both rank among their k likeliest:

    - sum_{v in S} sg[p(v) (log p_T(v) - log p(v) - b)] log p(v),  b = sum_{v in S} p(v) (log p_T(v) - log p(v)) / p(S)

    sg[] stops the gradient. Where S is everything this is the gradient of KL(p || p_T); the baseline b changes nothing
    in expectation then, and otherwise keeps p(S) as it is. (The 2.0 report multiplies the sum without gradient by the
    log-probability of the sampled token; that has an expected gradient of zero.) `log_probs`, with gradient, and
    `teacher` float32 [n, k] of the student's k likeliest tokens; `shared` bool [n, k], those in S.

    Returns the losses float32 [n], and the student's probability of S, float32 [n].
    """
    fixed = log_probs.detach()
    probs = fixed.exp() * shared
    mass = probs.sum(1)
    gap = (teacher - fixed).masked_fill(~shared, 0.0)
    baseline = (probs * gap).sum(1) / mass.clamp_min(1e-12)
    weights = probs * (gap - baseline[:, None])
    return -(weights * log_probs.masked_fill(~shared, 0.0)).sum(1), mass


def load_balance(logits: Tensor, chosen: Tensor) -> Tensor:
    """The load-balancing loss of a router (Switch Transformers): E * sum_e f_e P_e, with f_e the share of choices that
    fell on expert e and P_e its mean probability. 1 where all are used alike. `logits` float32 [T, E], `chosen` int64
    [T, K]."""
    experts = logits.shape[1]
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


def router_z(logits: Tensor) -> Tensor:
    """The z-loss of a router (ST-MoE): mean over tokens of (log sum_e exp logits[e])^2, which keeps logits float32
    [T, E] small."""
    return logits.logsumexp(-1).square().mean()


def siglip_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The sigmoid loss of n pictures with their captions (SigLIP):

    -1/n sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b)), z_ij = 1 where i = j, else -1,

    x and y the embeddings of `images` and `texts` [n, d], brought to length 1; t = exp(`scale`) and b = `bias` are
    learnt numbers.
    """
    x, y = F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)
    logits = x @ y.mT * scale.exp() + bias
    signs = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)
