"""The training step: what each token of a packed batch attends to, and what is learnt beside the next token.

Segments form trees (`keye.train.tree`): branches of one trunk do not see one another, so that one pass over a video
supervises all its questions. Attention over the trees is `keye.ops.tree`.

Legend: T tokens, H heads, G groups, D head dim, E experts, n queries of a hint, P keys of a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keye.config import TextConfig
from keye.models.attention import IndexerOutput
from keye.ops.latent import LatentQuery, expand
from keye.ops.tree import Recall, Segment, SparseFigures, attend_dense, attend_sparse, attend_warmup
from keye.train.config import TrainMode


@dataclass(frozen=True)
class AttentionHint:
    """Where one head of a layer should look: token `queries[i]` (int64 [n]) at those of the P tokens from `first[i]`
    (int64 [n]) on for which `targets[i]` (bool [n, P]) is true."""

    name: str
    layer: int
    queries: Tensor
    first: Tensor
    targets: Tensor
    head: int = 0


@dataclass(frozen=True)
class RowShare:
    """The tokens start .. stop of a pack that this process computes, where several divide them. `gather` is all rows
    of a tensor of which each has its own, with gradients; `sum` adds up tensors of the processes, without."""

    start: int
    stop: int
    parts: int
    gather: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]


class RouterFigures(NamedTuple):
    """What a router did with `tokens` tokens: `counts` float32 [E], how often each expert was chosen; with gradients
    `probabilities` float32 [E], summed over tokens, and `z`, the sum of squared logarithms of the softmax sums."""

    counts: Tensor
    probabilities: Tensor
    z: Tensor
    tokens: int


class TreeStep:
    """Attention and auxiliary losses of one training step over `segments` int64 [n, 3]: start, stop and the segment
    above, -1 for none. Tokens outside all segments are padding.

    `mode` is dense; warmup, which is dense and teaches the indexer over all keys; or sparse, which attends to the
    indexer's `topk` keys and teaches it over those. For each of `hints`, `hint_losses[name]` is the mean of
    -log(share of the hinted head's attention to the P tokens that the targets get). `hidden[layer]` are the watched
    residual streams [T, d]. With `measure_recall`, `recalls[layer]` tells how the chosen keys compare with the best.

    A layer that activation checkpointing computes again changes nothing here.
    """

    def __init__(
        self, segments: Any, config: TextConfig, mode: TrainMode = "dense", topk: int | None = None, *,
        watch: Sequence[int] = (), hints: Sequence[AttentionHint] = (), teach: bool = True,
        measure_recall: bool = False,
    ) -> None:  # fmt: skip
        assert mode == "dense" or config.sparse is not None, "only a model with an indexer attends sparsely"
        self.mode, self.watch, self.hints, self.teach = mode, tuple(watch), hints, teach
        self.sparse = mode != "dense" and (mode == "sparse" or teach)
        self.topk = topk or (config.sparse.topk if config.sparse is not None else 0)
        rows = tuple(tuple(int(number) for number in row) for row in segments.tolist())
        self.segments, self.measure_recall = link_segments(rows), measure_recall
        self.hint_losses: dict[str, Tensor] = {}
        self.indexer: dict[int, SparseFigures] = {}
        self.routers: dict[int, RouterFigures] = {}
        self.hidden: dict[int, Tensor] = {}
        self._inside: Tensor | None = None
        self.share: RowShare | None = None
        #: Processes that have some heads each of the same tokens, and the same routers.
        self.copies = 1

    @property
    def parts(self) -> int:
        """How many processes divide the pack or its heads; losses are this process's part of a sum over them."""
        return self.copies * (1 if self.share is None else self.share.parts)

    def divide(self, share: RowShare) -> None:
        """Has this process compute the tokens of `share` alone. Keys and values are gathered, losses are this process's
        part of those of all tokens: their sum over the processes is the loss."""
        self.share, self.segments = share, cut_segments(self.segments, share.start, share.stop)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        for hint in self.hints:
            if hint.layer == layer:
                self.hint_losses.setdefault(hint.name, hint_loss(hint, q, k))
        if self.share is not None:
            k, v = self.share.gather(k), self.share.gather(v)
            index = None if index is None else index._replace(k=self.share.gather(index.k))
        if index is None:
            return attend_dense(q, k, v, self.segments)
        operands = q, k, v, index.q, index.k, index.gate, self.segments
        if self.mode == "warmup":
            out, figures = attend_warmup(*operands, recall_of=self.topk if self.measure_recall else 0)
        else:
            out, figures = attend_sparse(*operands, self.topk, teach=self.teach, measure=self.measure_recall)
        self.indexer.setdefault(layer, figures)
        return out

    def attend_latent(self, layer: int, query: LatentQuery, latent: Tensor, rope_k: Tensor) -> Tensor:
        """Over the keys and values that latents are expanded to."""
        q = torch.cat((query.nope, query.rope), dim=2)
        q = q * (query.scale * q.shape[2] ** 0.5)  # `attend` divides by the root again
        return self.attend(layer, q, *expand(latent, rope_k, query.weight, query.nope.shape[2]), None)

    def observe_layer(self, layer: int, hidden: Tensor) -> None:
        if layer in self.watch:
            self.hidden.setdefault(layer, hidden)

    def observe_router(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        inside = self._find_inside(len(logits), logits.device)
        if inside is not None:
            logits, chosen = logits[inside], chosen[inside]
        counts = torch.bincount(chosen.flatten(), minlength=logits.shape[1]).float()
        z = logits.logsumexp(-1).square().sum()
        self.routers.setdefault(layer, RouterFigures(counts, logits.softmax(-1).sum(0), z, len(logits)))

    def kl(self) -> Tensor:
        """The indexer's loss, summed over groups (2.0 report), per query and layer."""
        figures = self.indexer.values()
        rows = self._sum(float(sum(figure.rows for figure in figures)))
        return torch.stack([figure.kl_sum for figure in figures]).sum() / rows

    def recalls(self) -> list[Recall]:
        """How the keys of each layer compare with the best."""
        return [figures.recall for figures in self.indexer.values() if figures.recall is not None]

    def expert_counts(self) -> Tensor:
        """How often each expert of each routed layer was chosen, float32 [layers, E]: sums over processes belong in
        `balance`."""
        return torch.stack([router.counts for router in self.routers.values()])

    def balance(self, counts: Tensor | None = None, tokens: float | None = None) -> Tensor:
        """Mean over layers of the load-balancing loss (Switch): E * sum_e share_of_choices[e] * mean_prob[e].

        `counts` [layers, E] and `tokens` are those of all processes; the sum of their results is then the loss.
        """
        counts = self._sum_counts(self.expert_counts()) if counts is None else counts
        routers = list(self.routers.values())
        tokens = tokens or self._sum(routers[0].tokens)
        means = torch.stack([router.probabilities for router in routers]) / tokens
        return counts.shape[1] * (counts / counts.sum(1, keepdim=True) * means).sum(1).mean() / self.copies

    def z(self, tokens: float | None = None) -> Tensor:
        """Mean over layers of the router z-loss (ST-MoE): the mean of (log sum_e exp logits[e])^2 over tokens."""
        routers = list(self.routers.values())
        tokens = tokens or self._sum(routers[0].tokens)
        return torch.stack([router.z for router in routers]).mean() / (tokens * self.copies)

    def _sum(self, value: float) -> float:
        """The sum of a number over the processes that divide the pack."""
        return value if self.share is None else float(self.share.sum(torch.tensor(value, dtype=torch.float64)))

    def _sum_counts(self, counts: Tensor) -> Tensor:
        return counts if self.share is None else self.share.sum(counts)

    def _find_inside(self, length: int, device: torch.device) -> Tensor | None:
        """The tokens of all segments, None where that is every token."""
        if sum(segment.stop - segment.start for segment in self.segments) == length:
            return None
        if self._inside is None:
            ranges = [torch.arange(segment.start, segment.stop, device=device) for segment in self.segments]
            self._inside = torch.cat(ranges)
        return self._inside


@lru_cache(maxsize=16)
def link_segments(rows: tuple[tuple[int, int, int], ...]) -> tuple[Segment, ...]:
    """The segments (start, stop, above) with the keys that their tokens see."""
    linked: list[Segment] = []
    for start, stop, above in rows:
        assert above < len(linked) and start < stop, "segments above come first, and none is empty"
        keys, first = (linked[above].keys, linked[above].length) if above >= 0 else ((), 0)
        begin, before = (keys[-1][0], keys[:-1]) if keys and keys[-1][1] == start else (start, keys)
        linked.append(Segment(start, stop, (*before, (begin, stop)), first))
    return tuple(linked)


def cut_segments(segments: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """What of the segments lies in rows start .. stop, which are numbered from 0 then; keys stay where they are."""
    cut = []
    for segment in segments:
        first, last = max(segment.start, start), min(segment.stop, stop)
        if first < last:
            keys = (*segment.keys[:-1], (segment.keys[-1][0], last))
            cut.append(Segment(first - start, last - start, keys, segment.first + first - segment.start))
    return tuple(cut)


def hint_loss(hint: AttentionHint, q_THD: Tensor, k_TGD: Tensor) -> Tensor:
    """The mean over queries of -log(share of their attention to the hint's keys that its targets get)."""
    groups = k_TGD.shape[1]
    rows = hint.first[:, None] + torch.arange(hint.targets.shape[1], device=hint.first.device)
    q = q_THD[hint.queries, hint.head].float()
    k = k_TGD[:, hint.head * groups // q_THD.shape[1]][rows].float()
    log_share = (torch.einsum("nd,npd->np", q, k) * q.shape[-1] ** -0.5).log_softmax(-1)
    return -log_share.masked_fill(~hint.targets, -torch.inf).logsumexp(-1).mean()
