"""Attention over trees of segments against the naive version: outputs, the indexer's loss, gradients of both, the keys
that are selected, and what is left alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.ops import registry
from keye.ops.tree import Segment, attend_dense, attend_sparse, attend_warmup, select_keys
from tests.ops.tree_cases import attend, choose, make_operands, make_tree, visible

FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
TOLERANCE = 1e-5


def check(ours, wanted, operands, names="q k v indexer_q indexer_k gate", tolerance=TOLERANCE):
    """Outputs, losses and the gradients of a random function of both, which must be equal."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(wanted[0].shape, generator=generator)
    gradients = []
    for out, kl in (ours, wanted):
        loss = (out.float() * weights).sum() + 0.7 * kl
        gradients.append(torch.autograd.grad(loss, operands, allow_unused=True, materialize_grads=True))
    pairs = [("out", ours[0], wanted[0]), ("kl", ours[1], wanted[1])]
    pairs += list(zip(names.split(), *gradients, strict=True))
    for name, a, b in pairs:
        scale = max(1.0, float(b.detach().float().abs().max()))
        assert float((a.detach().float() - b.detach().float()).abs().max()) <= tolerance * scale, name


@FEW
@given(seed=SEEDS, value_dim=st.sampled_from([16, 24]))
def test_dense_attention_and_its_gradients(seed, value_dim):
    tree = make_tree(seed)
    operands = make_operands(tree, seed, value_dim=value_dim)
    out = attend_dense(*operands[:3], tree.segments)
    wanted = attend(operands, visible(tree))[0]
    zero = torch.zeros(())
    check((out, zero), (wanted, zero), operands)


@FEW
@given(seed=SEEDS)
def test_warmup_teaches_over_every_key(seed):
    tree = make_tree(seed)
    operands = make_operands(tree, seed)
    out, figures = attend_warmup(*operands, tree.segments)
    assert figures.rows == sum(segment.stop - segment.start for segment in tree.segments)
    check((out, figures.kl_sum), attend(operands, visible(tree)), operands)


@FEW
@given(seed=SEEDS, topk=st.integers(1, 60))
def test_sparse_attention_and_the_loss_over_its_sets(seed, topk):
    tree = make_tree(seed)
    operands = make_operands(tree, seed)
    sets = select_keys(operands.q, operands.k, *operands[3:], tree.segments, topk)
    mask = torch.zeros(tree.queries, tree.keys + 1, dtype=torch.bool).scatter_(1, sets.long() % (tree.keys + 1), True)
    mask = mask[:, :-1]
    assert torch.equal(mask.sum(1), visible(tree).sum(1).clamp_max(topk))
    assert float((mask != choose(operands, visible(tree), topk)).float().mean()) < 1e-3  # near ties
    out, figures = attend_sparse(*operands, tree.segments, topk, teach=True)
    check((out, figures.kl_sum), attend(operands, mask), operands)


def test_without_a_loss_the_indexer_gets_no_gradient():
    tree = make_tree(1)
    operands = make_operands(tree, 1)
    out, figures = attend_sparse(*operands, tree.segments, 8, teach=False)
    assert float(figures.kl_sum) == 0
    gradients = torch.autograd.grad(out.sum(), operands, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True] * 3 + [False] * 3


def test_the_loss_of_the_indexer_does_not_reach_queries_keys_and_values():
    tree = make_tree(2)
    operands = make_operands(tree, 2)
    _, figures = attend_sparse(*operands, tree.segments, 8, teach=True)
    gradients = torch.autograd.grad(figures.kl_sum, operands, allow_unused=True, materialize_grads=True)
    assert [float(gradient.abs().sum()) > 0 for gradient in gradients] == [False] * 3 + [True] * 3


def test_branches_do_not_see_one_another():
    segments = (Segment(0, 30, ((0, 30),), 0), Segment(30, 36, ((0, 30), (30, 36)), 30),
                Segment(36, 44, ((0, 30), (36, 44)), 30))  # fmt: skip
    tree = make_tree(0)
    tree = type(tree)(segments, 44, 44)
    for attend_tree in (
        lambda x: attend_dense(x.q, x.k, x.v, segments), lambda x: attend_sparse(*x, segments, 12, teach=False)[0]
    ):  # fmt: skip
        operands, others = make_operands(tree, 3), make_operands(tree, 4)
        changed = operands._replace(
            **{
                name: torch.cat((getattr(operands, name)[:36], getattr(others, name)[36:])).detach()
                for name in operands._fields
            }
        )
        assert torch.equal(attend_tree(operands)[:36], attend_tree(changed)[:36])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_chain_of_segments_selects_what_one_segment_does(dtype, kernels):
    """Cutting a sequence into ancestors changes no set: scores are the same to the last bit."""
    length, topk = 301, 37
    single = (Segment(0, length, ((0, length),), 0),)
    cuts = [0, 70, 71, 199, length]
    chain = tuple(
        Segment(a, b, tuple(itertools.pairwise(cuts[: i + 2])), a) for i, (a, b) in enumerate(itertools.pairwise(cuts))
    )
    tree = type(make_tree(0))(single, length, length)
    operands = make_operands(tree, 5, dtype)
    with registry.backends.using(kernels):
        sets = [select_keys(operands.q, operands.k, *operands[3:], segments, topk) for segments in (single, chain)]
    assert torch.equal(*sets)


def test_queries_of_a_part_see_the_keys_before_it():
    """What context parallelism asks for: the queries of one rank, the keys of all."""
    length, start = 90, 55
    full = type(make_tree(0))((Segment(0, length, ((0, length),), 0),), length, length)
    part = Segment(0, length - start, ((0, length),), start)
    operands = make_operands(full, 6)
    q, indexer_q, gate = (x[start:].detach() for x in (operands.q, operands.indexer_q, operands.gate))
    dense = attend_dense(*operands[:3], full.segments)
    sparse = attend_sparse(*operands, full.segments, 20, teach=True)[0]
    assert torch.allclose(attend_dense(q, operands.k, operands.v, [part]), dense[start:], atol=1e-6)
    ours = attend_sparse(q, operands.k, operands.v, indexer_q, operands.indexer_k, gate, [part], 20, teach=True)[0]
    assert torch.allclose(ours, sparse[start:], atol=1e-6)


def test_recall_is_the_share_of_dense_attention_inside_the_sets():
    tree, topk = make_tree(8, trunk=80), 10
    operands = make_operands(tree, 8)
    recall = attend_sparse(*operands, tree.segments, topk, teach=False, measure=True)[1].recall
    assert recall is not None and recall == attend_warmup(*operands, tree.segments, recall_of=topk)[1].recall
    mask = visible(tree)
    q, k = operands.q, operands.k.repeat_interleave(2, 1)
    logits = (torch.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5).masked_fill(~mask, -1e30)
    shares = logits.softmax(-1).mean(0)
    some = mask.sum(1) > topk
    chosen = choose(operands, mask, topk)
    assert recall.rows == int(some.sum())
    assert recall.mass == pytest.approx(float((shares * chosen)[some].sum()), rel=1e-4)
    assert recall.best == pytest.approx(float(shares.topk(topk, dim=1).values[some].sum()), rel=1e-4)
    assert 0 < recall.against_best < 1
