"""Which keys the reference keeps: a stable top-k, the same under every chunking of the prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keye.ops import reference
from keye.ops.reference import indexer_scores, select_random, select_recent, select_topk, topk_mask

Chunks = Callable[[int, int], list[int]]
SEEDS = st.integers(0, 2**32 - 1)


def integers(seed: int, length: int, heads: int = 4, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and gates of small integers: sums are exact in any order, zero scores and duplicates abound."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    return draw(length, heads, dim), draw(length, dim), draw(length, heads)


def stable_topk(scores: Tensor, topk: int) -> list[list[int]]:
    """The naive definition: sort every causal score of a row, earlier positions first among equals."""
    chosen = []
    for t, row in enumerate(scores):
        order = row[: t + 1].sort(descending=True, stable=True).indices
        chosen.append(sorted(order[:topk].tolist()))
    return chosen


def select_in_chunks(q: Tensor, k: Tensor, gate: Tensor, topk: int, chunks: list[int]) -> Tensor:
    """Selected positions [T, topk] when the prompt arrives in chunks; later keys do not exist yet."""
    selected, first = [], 0
    for n in chunks:
        seen = k[: first + n]

        def tiles(start: int, stop: int, seen: Tensor = seen) -> Tensor:
            assert stop <= len(seen), "a key from the future was asked for"
            return seen[start:stop]

        part = slice(first, first + n)
        blocks = list(select_topk(q[part], gate[part], tiles, first, topk))
        assert [offset for offset, _ in blocks] == [sum(len(p) for _, p in blocks[:i]) for i in range(len(blocks))]
        selected += [positions for _, positions in blocks]
        first += n
    return torch.cat(selected)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough that a short prompt crosses many of them."""
    monkeypatch.setattr(reference, "KEY_TILE", 32)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 8)


@pytest.mark.usefixtures("small_tiles")
class TestSmallTiles:
    @pytest.mark.parametrize("seed", range(30))
    def test_equals_a_stable_sort(self, seed: int, make_chunks: Chunks) -> None:
        length, topk = 20 + 9 * seed % 170, 1 + seed % 13
        q, k, gate = integers(seed, length)
        want = stable_topk(indexer_scores(q, k, gate), topk)
        got = select_in_chunks(q, k, gate, topk, make_chunks(seed, length))
        assert [[p for p in row if p >= 0] for row in got.tolist()] == want

    @pytest.mark.parametrize("seed", range(30))
    def test_chunking_changes_no_bit(self, seed: int, make_chunks: Chunks) -> None:
        """Real numbers with repeated and zero keys: scores are inexact, equal scores come from equal keys."""
        length, topk = 150, 12
        generator = torch.Generator().manual_seed(seed)
        q, k = torch.randn(length, 4, 16, generator=generator), torch.randn(length, 16, generator=generator)
        gate = torch.randn(length, 4, generator=generator)
        k[torch.rand(length, generator=generator) < 0.3] = k[0].clone()
        k[torch.rand(length, generator=generator) < 0.2] = 0.0
        total = select_in_chunks(q, k, gate, topk, [length])
        assert torch.equal(select_in_chunks(q, k, gate, topk, [1] * length), total)
        for repeat in range(3):
            chunks = make_chunks(1000 * seed + repeat, length)
            assert torch.equal(select_in_chunks(q, k, gate, topk, chunks), total), chunks

    def test_rows_ascend_and_end_with_none(self) -> None:
        q, k, gate = integers(3, 40)
        for t, row in enumerate(select_in_chunks(q, k, gate, 6, [40]).tolist()):
            remaining = [p for p in row if p >= 0]
            assert len(remaining) == min(6, t + 1)
            assert remaining == sorted(set(remaining))
            assert row[len(remaining) :] == [-1] * (6 - len(remaining))

    def test_all_scores_equal_keeps_the_first_positions(self) -> None:
        q, k, gate = torch.zeros(100, 4, 8), torch.randn(100, 8), torch.randn(100, 4)
        assert select_in_chunks(q, k, gate, 5, [33, 1, 66])[-1].tolist() == [0, 1, 2, 3, 4]


def test_real_blocks_and_tiles(make_chunks: Chunks) -> None:
    """The shipped block sizes, over a prompt that ends inside the second tile."""
    length, topk = reference.KEY_TILE + 130, 40
    q, k, gate = integers(0, length)
    total = select_in_chunks(q, k, gate, topk, [length])
    assert [[p for p in row if p >= 0] for row in total.tolist()] == stable_topk(indexer_scores(q, k, gate), topk)
    assert torch.equal(select_in_chunks(q, k, gate, topk, make_chunks(1, length)), total)


def test_real_numbers_at_real_blocks(make_chunks: Chunks) -> None:
    """The geometry of 2.0: 16 indexer heads of 64 dimensions."""
    length, topk = reference.KEY_TILE + 70, 200
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(length, 16, 64, generator=generator), torch.randn(length, 64, generator=generator)
    gate = torch.randn(length, 16, generator=generator)
    total = select_in_chunks(q, k, gate, topk, [length])
    assert torch.equal(select_in_chunks(q, k, gate, topk, make_chunks(2, length)), total)


@given(SEEDS, st.integers(1, 30), st.integers(1, 6))
@settings(max_examples=50)
def test_topk_mask_keeps_exactly_k(seed: int, width: int, values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (5, width), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    k = 1 + seed % width
    mask = topk_mask(scores, k)
    assert mask.sum(-1).tolist() == [k] * 5
    for row, remaining in zip(scores, mask, strict=True):
        order = row.sort(descending=True, stable=True).indices[:k]
        assert sorted(order.tolist()) == remaining.nonzero().flatten().tolist()


@pytest.mark.parametrize(("total", "first", "topk"), [(1, 0, 4), (70, 0, 8), (5, 90, 16), (40, 3, 1)])
def test_controls_select_causal_keys(total: int, first: int, topk: int) -> None:
    recent = torch.cat([p for _, p in select_recent(total, first, topk)])
    random = torch.cat([p for _, p in select_random(total, first, topk, torch.Generator().manual_seed(0))])
    for t in range(total):
        last, count = first + t, min(topk, first + t + 1)
        assert [p for p in recent[t].tolist() if p >= 0] == list(range(last - count + 1, last + 1))
        remaining = [p for p in random[t].tolist() if p >= 0]
        assert len(remaining) == count
        assert remaining == sorted(set(remaining))
        assert remaining[-1] == last, "a query's own position is always among a random set"
    assert recent.shape == random.shape == (total, topk)


def test_random_sets_differ_between_seeds() -> None:
    def draw(seed: int) -> Tensor:
        return torch.cat([p for _, p in select_random(50, 200, 8, torch.Generator().manual_seed(seed))])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_keys_are_drawn_where_the_generator_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    rand = torch.rand

    def watched(*size: int, **options: object) -> Tensor:
        drawn.append(options.get("device"))
        return rand(*size, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "rand", watched)
    generator = torch.Generator("cpu")
    list(select_random(3, 0, 2, generator))
    assert drawn == [generator.device]
