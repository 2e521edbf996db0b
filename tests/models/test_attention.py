"""Attention over sets of keys, against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keye.ops import reference
from keye.ops.reference import attend_union, dense_attention, masked_attention, sparse_attention

T, H, G, D, S = 21, 4, 2, 8, 60


def naive(q: Tensor, k: Tensor, v: Tensor, chosen: list[list[int]]) -> Tensor:
    """One query and head at a time; a query without keys gives zeros."""
    out = torch.zeros_like(q)
    for t, keys in enumerate(chosen):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            if keys:
                weights = (k[keys, g] @ q[t, h] / math.sqrt(q.shape[2])).softmax(0)
                out[t, h] = weights @ v[keys, g]
    return out


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((T, H, D), (S, G, D), (S, G, D)))  # type: ignore[return-value]


def rows_of(k: Tensor, v: Tensor) -> reference.Rows:
    return lambda positions: (k[positions], v[positions])


def random_sets(seed: int, width: int) -> Tensor:
    """Ascending positions [T, width], rows of different lengths filled with -1, one row empty."""
    generator = torch.Generator().manual_seed(seed)
    sets = torch.full((T, width), -1)
    for t in range(T):
        count = 0 if t == 4 else 1 + int(torch.randint(0, width, (), generator=generator))
        sets[t, :count] = torch.randperm(S, generator=generator)[:count].sort().values
    return sets


def as_lists(sets: Tensor) -> list[list[int]]:
    return [[p for p in row if p >= 0] for row in sets.tolist()]


@pytest.mark.parametrize("width", [1, 7, 30])
def test_union_equals_query_by_query(qkv: tuple[Tensor, Tensor, Tensor], width: int) -> None:
    q, k, v = qkv
    sets = random_sets(width, width)
    got = attend_union(q, sets, rows_of(k, v))
    torch.testing.assert_close(got, naive(q, k, v, as_lists(sets)), rtol=1e-5, atol=1e-5)
    assert got[4].abs().max() == 0, "a query without keys gives zeros"


def test_halving_under_a_small_budget_changes_nothing(
    qkv: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv
    sets = random_sets(1, 12)
    want = attend_union(q, sets, rows_of(k, v))
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 1)
    gathered: list[int] = []

    def rows(positions: Tensor) -> tuple[Tensor, Tensor]:
        gathered.append(len(positions))
        return k[positions], v[positions]

    torch.testing.assert_close(attend_union(q, sets, rows), want, rtol=1e-6, atol=1e-6)
    assert len(gathered) == T - 1, "each query with keys gathers its own rows"
    assert max(gathered) <= 12


def test_no_keys_at_all(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    assert torch.equal(attend_union(q, torch.full((T, 3), -1), rows_of(k, v)), torch.zeros_like(q))


def test_masked_rows_are_zero_not_nan(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    mask = torch.ones(T, S, dtype=torch.bool)
    mask[3] = False
    out = masked_attention(q, k, v, mask)
    assert torch.isfinite(out).all()
    assert out[3].abs().max() == 0


@given(
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 6)]),
    queries=st.integers(1, 40),
    first=st.integers(0, 70),
    dim=st.sampled_from([2, 8, 16]),
    block=st.integers(1, 50),
    budget=st.sampled_from([1, 20_000, 60_000, reference.SCRATCH_BYTES]),
    size=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_dense_is_causal_at_any_blocks_and_tiles(
    heads: tuple[int, int], queries: int, first: int, dim: int, block: int, budget: int, size: float
) -> None:
    generator, (H, G), total = torch.Generator().manual_seed(queries), heads, first + queries
    q, k, v = (torch.randn(*s, dim, generator=generator) for s in ((queries, H), (total, G), (total, G)))
    k *= size  # large scores: weights that a naive exponential would overflow, and a maximum that later tiles raise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "DENSE_BLOCK", block)
        patch.setattr(reference, "SCRATCH_BYTES", budget)
        got = dense_attention(q, rows_of(k, v), first)
    want = naive(q, k, v, [list(range(first + t + 1)) for t in range(queries)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("queries", "length"), [(1, 5000), (300, 5000), (1024, 1024)])
def test_dense_reads_keys_in_tiles_of_the_budget(queries: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, dim, budget = 4, 8, 2**20
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(length, 2, dim, generator=generator) for _ in range(2))
    results: list[int] = []

    def rows(positions: Tensor) -> tuple[Tensor, Tensor]:
        results.append(len(positions))
        return k[positions], v[positions]

    dense_attention(torch.randn(queries, heads, dim, generator=generator), rows, length - queries)
    block = min(queries, reference.DENSE_BLOCK)
    scores, gathered, sums = (4 * heads * block * max(results), 8 * heads * dim * max(results), 8 * heads * block * dim)
    assert 1 < max(results) < length
    assert scores + gathered + sums <= budget


def test_dense_keeps_the_dtype(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = (x.bfloat16() for x in qkv)
    got = dense_attention(q, rows_of(k, v), S - T)
    want = dense_attention(q.float(), rows_of(k.float(), v.float()), S - T)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16())


def test_sparse_over_all_keys_is_dense(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    first = S - T
    recent = reference.select_recent(T, first, S)
    got = sparse_attention(q, recent, rows_of(k, v))
    torch.testing.assert_close(got, dense_attention(q, rows_of(k, v), first), rtol=1e-5, atol=1e-5)
