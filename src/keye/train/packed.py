"""The training step: packed sequences, each a trunk (the video) with many branches (questions about it).

Branches of one trunk do not see one another, so one pass over a video supervises all its questions. Every sequence of
a step has the same trunk and tail length, and the tail is cut into windows that no branch crosses: attention is then a
few batched matrix products that hardly compute anything masked.

Legend: B sequences, P trunk tokens, L tail tokens, N = P + L, W window, M = L / W windows, H heads, G groups,
R = H / G, D head dim, J indexer heads, I indexer dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keye.models.attention import IndexerOutput
from keye.ops.elementwise import PLAIN, Elementwise
from keye.ops.latent import LatentQuery, expand
from keye.ops.reference import topk_mask
from keye.train.config import TrainMode

#: Trunk queries that attend together; each such block skips the keys after it.
TRUNK_BLOCK = 160


@dataclass(frozen=True)
class AttentionHint:
    """Where one head of a layer should look: token `queries[i]` of sequence `rows[i]` (int64 [n], counted from the
    start of the sequence) at the trunk tokens where `targets[i]` (bool [n, P]) is true."""

    name: str
    layer: int
    rows: Tensor
    queries: Tensor
    targets: Tensor
    head: int = 0


class PackedStep:
    """Masks and losses of one training step.

    `branch` int64 [B, L] numbers the branch of each tail token, -1 for padding; tokens of one branch are contiguous and
    lie in one window of `window` tokens (L is a multiple of it).
    For each of `hints`, `hint_losses[name]` is the mean of -log(share of the hinted head's attention to the trunk that
    the targets get). After the forward pass `indexer_kl()` and `balance_loss()` hold the auxiliary losses,
    `hidden[layer]` the watched residual streams.
    """

    def __init__(
        self, branch: Tensor, trunk: int, *, window: int, mode: TrainMode = "dense", topk: int = 0,
        watch: tuple[int, ...] = (), hints: Sequence[AttentionHint] = (), elementwise: Elementwise = PLAIN,
    ) -> None:  # fmt: skip
        assert branch.shape[1] % window == 0, "the tail must be whole windows"
        self.mode, self.topk, self.trunk, self.window, self.watch = mode, topk, trunk, window, watch
        self.sparse, self.branch, (self.batch, self.tail) = mode != "dense", branch, branch.shape
        windows = branch.unflatten(1, (-1, window))
        order = torch.arange(window, device=branch.device)
        same = (windows[..., :, None] == windows[..., None, :]) & (order <= order[:, None])
        seen = (windows >= 0)[..., None].expand(*windows.shape, trunk)
        self.window_mask = torch.cat((seen, same), dim=3)  # [B, M, W, P + W]
        self.hints, self.masked_softmax = hints, elementwise.masked_softmax
        self.hint_losses: dict[str, Tensor] = {}
        self.kl: list[Tensor] = []
        self.balance: list[Tensor] = []
        self.hidden: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        B, N, (H, D), G, P = self.batch, self.trunk + self.tail, q.shape[1:], k.shape[1], self.trunk
        q = q.view(B, N, G, H // G, D).permute(0, 2, 3, 1, 4)  # B G R N D
        k, v = k.view(B, N, G, D).transpose(1, 2), v.view(B, N, G, -1).transpose(1, 2)  # B G N D
        for hint in self.hints:
            if hint.layer == layer:
                self.hint_losses[hint.name] = hint_loss(hint, q.flatten(1, 2), k[:, :, :P])
        if index is None:
            parts = list(_attend_causally(q[..., :P, :], k[:, :, :P], v[:, :, :P], self.masked_softmax))
            if self.tail:
                logits = self._window_logits(q[..., P:, :], k)
                probs = self.masked_softmax(logits, self.window_mask[:, None, None], D**-0.5)
                parts.append(self._window_output(probs, v))
            out = torch.cat(parts, dim=3)
        else:
            out = self._attend_and_teach(q, k, v, index)
        return out.permute(0, 3, 1, 2, 4).reshape(B * N, H, -1)

    def attend_latent(self, layer: int, query: LatentQuery, latent: Tensor, rope_k: Tensor) -> Tensor:
        """Over the keys and values that latents are expanded to."""
        q = torch.cat((query.nope, query.rope), dim=2)
        q = q * (query.scale * q.shape[2] ** 0.5)  # `attend` divides by the root again
        return self.attend(layer, q, *expand(latent, rope_k, query.weight, query.nope.shape[2]), None)

    def _window_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Tail queries [B, G, R, L, D] against the trunk and their own window: [B, G, R, M, W, P + W], unscaled."""
        (B, G, R, L, _), P, W = q.shape, self.trunk, self.window
        M = L // W
        to_trunk = torch.matmul(q.flatten(2, 3), k[:, :, :P].mT).view(B, G, R, M, W, P)
        own = q.unflatten(3, (M, W)).transpose(2, 3).flatten(3, 4)  # B G M RW D
        to_own = torch.matmul(own, k[:, :, P:].unflatten(2, (M, W)).mT).view(B, G, M, R, W, W).transpose(2, 3)
        return torch.cat((to_trunk, to_own), dim=-1)

    def _window_output(self, probs: Tensor, v: Tensor) -> Tensor:
        """Probabilities [B, G, R, M, W, P + W] times values: [B, G, R, L, D]."""
        (B, G, R, M, W, _), P = probs.shape, self.trunk
        from_trunk = torch.matmul(probs[..., :P].reshape(B, G, R * M * W, P), v[:, :, :P])
        own = probs[..., P:].transpose(2, 3).reshape(B, G, M, R * W, W)
        from_own = torch.matmul(own, v[:, :, P:].unflatten(2, (M, W))).unflatten(3, (R, W)).transpose(2, 3)
        return from_trunk.view(B, G, R, M * W, -1) + from_own.reshape(B, G, R, M * W, -1)

    def _attend_and_teach(self, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput) -> Tensor:
        """Attention as the mode says, with the KL of the indexer against it: first the trunk, then the windows."""
        B, N, P, D = self.batch, self.trunk + self.tail, self.trunk, q.shape[-1]
        indexer_q = index.q.float().view(B, N, 1, *index.q.shape[1:]).permute(0, 2, 3, 1, 4)  # B 1 J N I
        indexer_k = index.k.float().view(B, 1, N, -1)
        gate = index.gate.view(B, N, -1).transpose(1, 2)  # B J N
        logits = torch.matmul(q[..., :P, :].flatten(2, 3), k[:, :, :P].mT).unflatten(2, (q.shape[2], P))
        scores = torch.matmul(indexer_q[:, 0, :, :P], indexer_k[..., :P, :].mT)  # B J P P
        scores = (scores.relu() * gate[:, :, :P, None]).sum(1)
        mask = torch.ones(P, P, dtype=torch.bool, device=q.device).tril().expand(B, P, P)
        probs, loss = self._select_and_teach(logits, scores, mask, D)
        parts = [torch.matmul(probs.flatten(2, 3), v[:, :, :P]).unflatten(2, probs.shape[2:4])]
        count = torch.tensor(B * P, device=q.device)
        if self.tail:
            logits = self._window_logits(q[..., P:, :], k)
            scores = self._window_logits(indexer_q[..., P:, :], indexer_k)[:, 0]  # B J M W (P + W)
            scores = (scores.relu() * gate[:, :, P:].unflatten(2, (-1, self.window))[..., None]).sum(1)
            probs, more = self._select_and_teach(logits, scores, self.window_mask, D)
            parts.append(self._window_output(probs, v))
            loss, count = loss + more, count + (self.branch >= 0).sum()
        self.kl.append(loss / count)
        return torch.cat(parts, dim=3)

    def _select_and_teach(self, logits: Tensor, scores: Tensor, mask: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Logits [B, G, R, ..., S], scores and mask [B, ..., S] -> probabilities, and the KL summed over queries."""
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.mode == "sparse" and scores.shape[-1] > self.topk:
            mask = mask & topk_mask(scores.detach(), self.topk)
            scores = scores.masked_fill(~mask, -torch.inf)
        probs = self.masked_softmax(logits, mask[:, None, None], dim**-0.5)
        return probs, _indexer_kl(probs.detach(), scores)

    def indexer_kl(self) -> Tensor:
        """Mean over layers of KL(attention averaged over heads || indexer softmax), per valid query."""
        return torch.stack(self.kl).mean()

    def balance_loss(self) -> Tensor:
        """Mean over layers of the load-balancing loss (Switch): E * sum_e share_of_tokens[e] * mean_prob[e]."""
        return torch.stack(self.balance).mean()

    def observe_layer(self, layer: int, hidden: Tensor) -> None:
        if layer in self.watch:
            self.hidden[layer] = hidden

    def observe_router(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        experts = logits.shape[-1]
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        self.balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, softmax: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Causal grouped attention of `q` [B, G, R, T, D], block by block of queries: yields [B, G, R, block, D]."""
    R, length, scale = q.shape[2], q.shape[3], q.shape[4] ** -0.5
    order = torch.arange(length, device=q.device)
    for start in range(0, length, TRUNK_BLOCK):
        stop = min(length, start + TRUNK_BLOCK)
        logits = torch.matmul(q[..., start:stop, :].flatten(2, 3), k[:, :, :stop].mT)
        mask = order[:stop] <= order[start:stop, None]
        probs = softmax(logits.unflatten(2, (R, stop - start)), mask, scale)
        yield torch.matmul(probs.flatten(2, 3), v[:, :, :stop]).unflatten(2, (R, stop - start))


def hint_loss(hint: AttentionHint, q_BHND: Tensor, k_BGPD: Tensor) -> Tensor:
    groups = k_BGPD.shape[1]
    q = q_BHND[hint.rows, hint.head, hint.queries].float()
    k = k_BGPD[hint.rows, hint.head * groups // q_BHND.shape[1]].float()
    log_share = (torch.einsum("nd,npd->np", q, k) * q.shape[-1] ** -0.5).log_softmax(-1)
    return -log_share.masked_fill(~hint.targets, -torch.inf).logsumexp(-1).mean()


def _indexer_kl(probs: Tensor, scores: Tensor) -> Tensor:
    """KL(p || softmax(I)) summed over queries, p the attention of all heads averaged; `probs` [B, G, R, ..., S].

    One teacher for all groups has the same gradient as the sum of the groups' KLs. Scores are -inf outside the set;
    a query that sees nothing (padding) counts as zero.
    """
    p = probs.float().mean((1, 2))
    empty = (scores == -torch.inf).all(-1)
    log_q = scores.masked_fill(empty[..., None], 0.0).log_softmax(-1).clamp_min(-60.0)
    kl = (p * (p.clamp_min(1e-9).log() - log_q)).sum(-1)
    return kl.masked_fill(empty, 0.0).sum()
