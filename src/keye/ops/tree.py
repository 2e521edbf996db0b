"""Attention of a training step over trees of segments, forward and backward, in bounded memory: dense, sparse, and the
warm-up in between, with the loss that teaches the indexer.

Tokens of a step lie behind one another, and segments of them form trees (video, question, reply): a token sees the
segments before its own and the tokens before it in its own. Between the forward and the backward pass no probability is
kept: int32 rows of the selected keys, and one number a head and query, are. Selection is the engine's, on the same
numbers in the same dtype as in inference, so that sets in training are those of inference.

Legend: T queries, S keys, H heads, G groups, D head dim, J indexer heads, I indexer dim, K selected keys.

The loss of the indexer (2.0 report): sum over queries t and groups g of KL(p[t,g] || softmax of I[t]) over the set of
the query (sparse) or every key that it sees (warm-up), with p[t,g] the mean of the softmax of the group's heads, which
the loss does not train. Its gradient in I[t] is G * (softmax of I[t] - mean of p[t,g] over groups): G times that of the
KL against one teacher, the average of all heads, whose own value is lower by the divergence of the groups from one
another. So a weight of the KL against the average is G times the report's lambda.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keye.ops import registry, tree_tiles
from keye.ops.cpu import train
from keye.ops.tree_selection import select_keys
from keye.ops.tree_tiles import Needs, Operands, Recall, Saved, Segment

__all__ = ["Recall", "Segment", "SparseFigures", "attend_dense", "attend_sparse", "attend_warmup", "select_keys"]


class SparseFigures(NamedTuple):
    """`kl_sum`: the loss of the indexer summed over `rows` queries and over groups, float32, whose gradient reaches the
    indexer's queries, keys and gates alone; 0 where nothing is taught. `recall` where it was asked for."""

    kl_sum: Tensor
    rows: int
    recall: Recall | None = None


def attend_dense(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Attention of `q` [T, H, D] over every key that each segment's tokens see, `k` [S, G, D] and `v` [S, G, Dv]:
    [T, H, Dv] in the dtype of `q`. Rows outside every segment are zeros, and reach no gradient."""
    out: Tensor = _Attention.apply(q, k, v, None, None, None, None, tuple(segments), False)[0]
    return out


def attend_warmup(
    q: Tensor, k: Tensor, v: Tensor, indexer_q: Tensor, indexer_k: Tensor, gate: Tensor, segments: Sequence[Segment],
    *, recall_of: int = 0,
) -> tuple[Tensor, SparseFigures]:  # fmt: skip
    """As `attend_dense`, and the loss of the indexer over all keys: `indexer_q` [T, J, I], `indexer_k` [S, I], `gate`
    [T, J]. With `recall_of`, the recall of that many keys of the indexer's choice is measured."""
    segments, recall = tuple(segments), None
    if recall_of:
        sets = select_keys(q, k, indexer_q, indexer_k, gate, segments, recall_of)
        recall = tree_tiles.measure_recall(Operands(q, k, v), segments, sets)
    out, kl_sum = _Attention.apply(q, k, v, indexer_q, indexer_k, gate, None, segments, True)
    return out, SparseFigures(kl_sum, _count(segments), recall)


def attend_sparse(
    q: Tensor, k: Tensor, v: Tensor, indexer_q: Tensor, indexer_k: Tensor, gate: Tensor, segments: Sequence[Segment],
    topk: int, *, teach: bool, measure: bool = False,
) -> tuple[Tensor, SparseFigures]:  # fmt: skip
    """Attention over the `topk` keys that the indexer scores highest, of those that a query sees; with `teach` the loss
    of the indexer over the same set. `measure` asks for the recall, which costs dense attention twice, without values.

    Shapes and results as in `attend_warmup`.
    """
    segments = tuple(segments)
    sets = select_keys(q, k, indexer_q, indexer_k, gate, segments, topk)
    recall = tree_tiles.measure_recall(Operands(q, k, v), segments, sets) if measure else None
    index = (indexer_q, indexer_k, gate) if teach else (None, None, None)
    out, kl_sum = _Attention.apply(q, k, v, *index, sets, segments, teach)
    return out, SparseFigures(kl_sum, _count(segments), recall)


def _count(segments: Sequence[Segment]) -> int:
    return sum(segment.stop - segment.start for segment in segments)


class _Kernels(NamedTuple):
    """`tree_tiles.forward` and `tree_tiles.backward`, or faster ones."""

    forward: Callable[..., tuple[Saved, Tensor]]
    backward: Callable[..., list[Tensor | None]]


def _choose_kernels(operands: Operands, sets: Tensor | None) -> _Kernels:
    q = operands.q
    if train.takes(operands, sets) and (core := registry.find_core(q, len(q))) is not None:
        return _Kernels(partial(train.forward, core), partial(train.backward, core))
    if registry.backends.of(q.device).name == "triton":
        from keye.ops.triton import train as cards

        if cards.takes(operands, sets):
            return _Kernels(cards.forward, cards.backward)
    return _Kernels(tree_tiles.forward, tree_tiles.backward)


class _Attention(torch.autograd.Function):
    """Output [T, H, Dv] and the loss of the indexer."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, indexer_q: Tensor | None, indexer_k: Tensor | None,
        gate: Tensor | None, sets: Tensor | None, segments: tuple[Segment, ...], teach: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        operands = Operands(q, k, v, indexer_q, indexer_k, gate)
        saved, kl_sum = _choose_kernels(operands, sets).forward(operands, segments, sets, teach=teach)
        ctx.segments = segments
        # Saved tensors, not attributes: activation checkpointing drops and recomputes those alone.
        ctx.save_for_backward(*operands, sets, *saved)
        return saved.out, kl_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_kl: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        operands, sets, saved = Operands(*tensors[:6]), tensors[6], Saved(*tensors[7:])
        needs = Needs(any(ctx.needs_input_grad[:3]), any(ctx.needs_input_grad[3:6]))
        kernels = _choose_kernels(operands, sets)
        gradients = kernels.backward(operands, ctx.segments, sets, saved, grad_out, grad_kl, needs)
        return (*gradients, None, None, None)
