"""The training step: packed sequences, each a trunk (the video) with many branches (questions about it).

Branches of one trunk do not see one another, so one pass over a video supervises all its questions. Every sequence of
a step has the same trunk and tail length, and the tail is cut into windows that no branch crosses: attention is then a
few batched matrix products that hardly compute anything masked.

Legend: B sequences, P trunk tokens, L tail tokens, N = P + L, W window, M = L / W windows, H heads, G groups, R = H / G,
D head dim, J indexer heads, I indexer dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from keye.models.indexer import IndexerOutput
from keye.ops.elementwise import table
from keye.ops.reference import topk_mask

#: Trunk queries that attend together; each such block skips the keys after it.
TRUNK_BLOCK = 160

#: `dense`: ordinary attention. `warmup`: the same, plus the indexer's KL against it over all causal keys.
#: `sparse`: attention over the selected keys, plus the KL over that set.
TrainMode = Literal["dense", "warmup", "sparse"]


class PackedStep:
    """Masks and losses of one training step.

    `branch` int64 [B, L] numbers the branch of each tail token, -1 for padding; tokens of one branch are contiguous and
    lie in one window of `window` tokens (L is a multiple of it).
    After the forward pass `indexer_kl()` and `balance_loss()` hold the auxiliary losses, `hidden[layer]` the watched
    residual streams.
    """

    def __init__(
        self,
        branch: Tensor,
        trunk: int,
        *,
        window: int,
        mode: TrainMode = "dense",
        topk: int = 0,
        watch: tuple[int, ...] = (),
    ) -> None:
        assert branch.shape[1] % window == 0, "the tail must be whole windows"
        self.mode, self.topk, self.trunk, self.window, self.watch = mode, topk, trunk, window, watch
        self.sparse = mode != "dense"
        self.batch, self.tail = branch.shape
        self.branch = branch
        self.valid = torch.cat((torch.ones(self.batch, trunk, dtype=torch.bool), branch >= 0), dim=1)
        windows = branch.unflatten(1, (-1, window))
        order = torch.arange(window)
        same = (windows[..., :, None] == windows[..., None, :]) & (order <= order[:, None])
        seen = (windows >= 0)[..., None].expand(*windows.shape, trunk)
        self.window_mask = torch.cat((seen, same), dim=3)  # [B, M, W, P + W]
        self.kl: list[Tensor] = []
        self.balance: list[Tensor] = []
        self.hidden: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        B, N, (H, D), G = self.batch, self.trunk + self.tail, q.shape[1:], k.shape[1]
        q = q.view(B, N, G, H // G, D).permute(0, 2, 3, 1, 4)  # B G R N D
        k, v = k.view(B, N, G, D).transpose(1, 2), v.view(B, N, G, D).transpose(1, 2)  # B G N D
        if self.mode == "dense":
            P = self.trunk
            parts = list(_attend_causally(q[..., :P, :], k[:, :, :P], v[:, :, :P]))
            if self.tail:
                parts.append(self._attend_windows(q[..., P:, :], k, v))
            out = torch.cat(parts, dim=3)
        else:
            assert index is not None
            out = self._attend_and_teach(q, k, v, index)
        return out.permute(0, 3, 1, 2, 4).reshape(B * N, H, D)

    def _attend_windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tail queries [B, G, R, L, D]: each sees the trunk and its own branch inside its window."""
        (B, G, R, L, D), P, W = q.shape, self.trunk, self.window
        M = L // W
        k_own, v_own = (t[:, :, P:].unflatten(2, (M, W)) for t in (k, v))  # B G M W D
        to_trunk = torch.matmul(q.flatten(2, 3), k[:, :, :P].mT).view(B, G, R, M, W, P)
        q_own = q.unflatten(3, (M, W)).transpose(2, 3).flatten(3, 4)  # B G M RW D
        to_own = torch.matmul(q_own, k_own.mT).view(B, G, M, R, W, W).transpose(2, 3)
        logits = torch.cat((to_trunk, to_own), dim=-1)
        probs = table.masked_softmax(logits, self.window_mask[:, None, None], D**-0.5)
        from_trunk = torch.matmul(probs[..., :P].reshape(B, G, R * L, P), v[:, :, :P])
        from_own = torch.matmul(probs[..., P:].transpose(2, 3).reshape(B, G, M, R * W, W), v_own)
        return from_trunk.view(B, G, R, L, D) + from_own.view(B, G, M, R, W, D).transpose(2, 3).reshape(B, G, R, L, D)

    def _attend_and_teach(self, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput) -> Tensor:
        """Sequence by sequence: scores, selection, attention over it, and the KL of the indexer against it."""
        N = self.trunk + self.tail
        index_q, index_k, gate = (t.view(self.batch, N, *t.shape[1:]) for t in index)
        outputs, losses = [], []
        for b in range(self.batch):
            mask = self._mask(b)
            logits = torch.einsum("njd,sd->jns", index_q[b], index_k[b]).float()
            scores = torch.einsum("jns,nj->ns", logits.relu(), gate[b].float())
            scores = scores.masked_fill(~mask, -torch.inf)
            if self.mode == "sparse" and N > self.topk:
                mask = mask & topk_mask(scores.detach(), self.topk)
            probs = _probabilities(q[b], k[b], mask)
            outputs.append(torch.matmul(probs.flatten(1, 2), v[b]).view(*probs.shape[:3], -1))
            losses.append(_indexer_kl(probs.detach(), scores.masked_fill(~mask, -torch.inf), self.valid[b]))
        self.kl.append(torch.stack(losses).mean())
        return torch.stack(outputs)

    def _mask(self, b: int) -> Tensor:
        """What each of the N tokens of sequence `b` may see, bool [N, N]; padding sees itself."""
        branch = torch.cat((torch.full((self.trunk,), -2), self.branch[b]))
        order = torch.arange(branch.shape[0])
        mask = ((branch[:, None] == branch) | (branch == -2)) & (order <= order[:, None])
        return (mask & self.valid[b][:, None]) | torch.diag(~self.valid[b])

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


def _attend_causally(q_BGRTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Iterator[Tensor]:
    """Causal grouped attention, block by block of queries: yields [B, G, R, block, D]."""
    length, scale, R = q_BGRTD.shape[3], q_BGRTD.shape[4] ** -0.5, q_BGRTD.shape[2]
    order = torch.arange(length)
    for start in range(0, length, TRUNK_BLOCK):
        stop = min(length, start + TRUNK_BLOCK)
        logits = torch.matmul(q_BGRTD[..., start:stop, :].flatten(2, 3), k_BGTD[:, :, :stop].mT)
        mask = order[:stop] <= order[start:stop, None]
        probs = table.masked_softmax(logits.unflatten(2, (R, stop - start)), mask, scale)
        yield torch.matmul(probs.flatten(2, 3), v_BGTD[:, :, :stop]).unflatten(2, (R, stop - start))


def _probabilities(q_GRTD: Tensor, k_GSD: Tensor, mask_TS: Tensor) -> Tensor:
    """Attention probabilities of one sequence: [G, R, T, S]."""
    logits = torch.matmul(q_GRTD.flatten(1, 2), k_GSD.transpose(-1, -2)).unflatten(1, q_GRTD.shape[1:3])
    return table.masked_softmax(logits, mask_TS, q_GRTD.shape[-1] ** -0.5)


def _indexer_kl(probs_GRTS: Tensor, scores_TS: Tensor, valid_T: Tensor) -> Tensor:
    """KL(p || softmax(I)) per valid query, p the attention of all heads averaged.

    One teacher for all groups has the same gradient as the sum of the groups' KLs. Scores are -inf outside the set.
    """
    p = probs_GRTS.float().mean((0, 1))
    log_q = scores_TS.log_softmax(-1).clamp_min(-60.0)
    kl = (p * (p.clamp_min(1e-9).log() - log_q)).sum(-1)
    return (kl * valid_T).sum() / valid_T.sum().clamp_min(1)
