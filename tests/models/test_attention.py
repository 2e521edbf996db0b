"""Attention over sets of keys, against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
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


@pytest.mark.parametrize("budget", [reference.SCRATCH_BYTES, 1, 20_000])
def test_dense_is_causal(qkv: tuple[Tensor, Tensor, Tensor], budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv
    monkeypatch.setattr(reference, "SCRATCH_BYTES", budget)
    first = S - T
    got = dense_attention(q, rows_of(k, v), first)
    want = naive(q, k, v, [list(range(first + t + 1)) for t in range(T)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sparse_over_all_keys_is_dense(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    first = S - T
    recent = reference.select_recent(T, first, S)
    got = sparse_attention(q, recent, rows_of(k, v))
    torch.testing.assert_close(got, dense_attention(q, rows_of(k, v), first), rtol=1e-5, atol=1e-5)
