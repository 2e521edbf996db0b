"""Random trees of segments, and dense attention over them in its plainest form: the oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from keye.ops.tree import Segment
from keye.ops.tree_tiles import Operands


@dataclass(frozen=True)
class Tree:
    """Segments of some trees, over `queries` rows of queries and `keys` rows of keys that are numbered apart."""

    segments: tuple[Segment, ...]
    queries: int
    keys: int


def make_tree(seed: int, trees: int = 2, trunk: int = 40, branch: int = 9, padding: int = 3) -> Tree:
    """Videos with questions, some of which have replies; rows of padding in between, and more among the keys."""
    rng = random.Random(seed)
    segments: list[Segment] = []
    at, shift = 0, 2 + rng.randrange(5)

    def add(ancestors: tuple[tuple[int, int], ...], length: int) -> tuple[tuple[int, int], ...]:
        nonlocal at, shift
        before = sum(stop - start for start, stop in ancestors)
        keys = (*ancestors, (at + shift, at + shift + length))
        segments.append(Segment(at, at + length, keys, before))
        at += length + rng.randrange(padding + 1)
        shift += rng.randrange(3)
        return keys

    for _ in range(trees):
        video = add((), 1 + rng.randrange(trunk))
        for _ in range(rng.randrange(4)):
            question = add(video, 1 + rng.randrange(branch))
            for _ in range(rng.randrange(3)):
                add(question, 1 + rng.randrange(branch))
    return Tree(tuple(segments), at + 2, at + shift + 3)


def make_operands(
    tree: Tree, seed: int, dtype: torch.dtype = torch.float32, heads: int = 4, groups: int = 2, dim: int = 16,
    value_dim: int | None = None, indexer: tuple[int, int] = (3, 16),
) -> Operands:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    J, I = indexer
    return Operands(
        draw(tree.queries, heads, dim), draw(tree.keys, groups, dim), draw(tree.keys, groups, value_dim or dim),
        draw(tree.queries, J, I), draw(tree.keys, I),
        torch.randn(tree.queries, J, generator=generator).mul(0.5).requires_grad_(),
    )  # fmt: skip


def visible(tree: Tree) -> Tensor:
    """Bool [T, S]: which keys each query sees."""
    mask = torch.zeros(tree.queries, tree.keys, dtype=torch.bool)
    for segment in tree.segments:
        rows = [row for start, stop in segment.keys for row in range(start, stop)]
        for query in range(segment.start, segment.stop):
            mask[query, rows[: segment.first + query - segment.start + 1]] = True
    return mask


def choose(operands: Operands, mask: Tensor, topk: int) -> Tensor:
    """The mask of the topk best-scored keys; equal scores go to the earlier key."""
    assert operands.indexer_q is not None and operands.indexer_k is not None and operands.gate is not None
    scores = index_scores(operands).detach().masked_fill(~mask, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    return torch.zeros_like(mask).scatter_(1, order, True) & mask


def index_scores(operands: Operands) -> Tensor:
    assert operands.indexer_q is not None and operands.indexer_k is not None and operands.gate is not None
    products = torch.einsum("tji,si->tjs", operands.indexer_q.float(), operands.indexer_k.float()).relu()
    return torch.einsum("tjs,tj->ts", products, operands.gate.float())


def attend(operands: Operands, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output [T, H, Dv] and the loss of the indexer, from [H, T, S] tensors and autograd."""
    q, k, v = (x.float() for x in operands[:3])
    heads, groups = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    logits = torch.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5
    seen = mask.any(1)
    probs = logits.masked_fill(~mask, -1e30).softmax(-1) * seen[:, None]
    out = torch.einsum("hts,shd->thd", probs, v)
    log_q = index_scores(operands).masked_fill(~mask, -1e30).log_softmax(-1)
    kl = out.new_zeros(())
    for teacher in probs.detach().unflatten(0, (groups, -1)).mean(1):
        kl = kl + (torch.special.xlogy(teacher, teacher) - teacher * log_q).masked_fill(~mask, 0).sum()
    return out, kl
