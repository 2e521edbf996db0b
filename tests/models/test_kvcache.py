"""The in-memory store of one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.cache.sequence import KVCache
from keye.cache.slabs import KVFormat, KVLayout, KVStore
from keye.models.attention import CachedStep, IndexerOutput, Span, cache_rows
from tests.support.rows import kv_rows
from tests.support.tiny import tiny_config


def entries(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ((n, 2, 4), (n, 2, 4), (n, 3)))  # type: ignore[return-value]


def assert_holds(cache: KVCache, layer: int, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor) -> None:
    length = len(k)
    assert cache.length(layer) == length
    for name, rows in kv_rows(k, v, index).items():
        assert torch.equal(cache.read(layer, name, torch.arange(length)), rows)
        assert torch.equal(cache.read_range(layer, name, 0, length), rows)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
@settings(max_examples=30)
def test_appended_tokens_come_back(lengths: list[int]) -> None:
    cache = KVCache(2)
    parts = [entries(i, n) for i, n in enumerate(lengths)]
    for part in parts:
        cache.append(1, kv_rows(*part))
    assert cache.length(0) == 0
    assert_holds(cache, 1, *(torch.cat(column) for column in zip(*parts, strict=True)))


def test_rows_by_position() -> None:
    cache = KVCache(1)
    k, v, index = entries(0, 50)
    cache.append(0, kv_rows(k, v, index))
    chosen = torch.tensor([3, 3, 49, 0])
    assert torch.equal(cache.read(0, "k", chosen), k[chosen])
    assert torch.equal(cache.read(0, "v", chosen), v[chosen])
    assert torch.equal(cache.read_range(0, "indexer_k", 10, 20).squeeze(1), index[10:20])


def test_fork_is_independent() -> None:
    cache = KVCache(1)
    first, mine, theirs = entries(0, 20), entries(1, 5), entries(2, 7)
    cache.append(0, kv_rows(*first))
    copy = cache.fork()
    cache.append(0, kv_rows(*mine))
    copy.append(0, kv_rows(*theirs))
    assert_holds(cache, 0, *(torch.cat(pair) for pair in zip(first, mine, strict=True)))
    assert_holds(copy, 0, *(torch.cat(pair) for pair in zip(first, theirs, strict=True)))


def test_truncate_forgets_and_can_be_written_again() -> None:
    cache = KVCache(2)
    first, second = entries(0, 30), entries(1, 10)
    cache.append(0, kv_rows(*first))
    cache.append(1, kv_rows(*first))
    cache.truncate(12)
    assert [cache.length(layer) for layer in (0, 1)] == [12, 12]
    cache.append(0, kv_rows(*second))
    assert_holds(cache, 0, *(torch.cat((a[:12], b)) for a, b in zip(first, second, strict=True)))
    cache.truncate(100)
    assert cache.length(0) == 22


def test_dense_models_store_no_indexer_keys() -> None:
    cache = KVCache(1)
    k, v, _ = entries(0, 4)
    cache.append(0, kv_rows(k, v))
    assert cache.length(0) == 4
    assert cache.store is not None and cache.store.layout.block_bytes == 2 * 4 * 2 * 4 * 64 and cache.blocks == 1


def test_branches_continue_from_a_fork(make_model: Any, make_prompt: Any, run_chunks: Any) -> None:
    """Two continuations of one prompt equal two separate prompts, and the first leaves no trace in the second."""
    model, prompt = make_model(), make_prompt(0, 30)
    cache = KVCache(2)

    def feed(target: KVCache, part: slice) -> torch.Tensor:
        step = CachedStep([Span(0, part.stop - part.start, target)], model.config.text)
        with torch.no_grad():
            return model.logits(model(model.embed(prompt.ids[part]), prompt.positions[:, part], step))

    feed(cache, slice(0, 20))
    for _ in range(2):
        got = feed(cache.fork(), slice(20, 30))
        torch.testing.assert_close(got, run_chunks(model, prompt, [30])[20:], rtol=0, atol=1e-4)
    feed(cache, slice(20, 25))
    cache.truncate(20)
    torch.testing.assert_close(feed(cache, slice(20, 30)), run_chunks(model, prompt, [30])[20:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv", ["int4", "int8", "fp8", "bf16"])
def test_rows_of_many_sequences_are_encoded_as_those_of_each(kv: KVFormat) -> None:
    config, generator = tiny_config(topk=4).text, torch.Generator().manual_seed(0)
    layout = KVLayout.of(cache_rows(config), torch.float32, kv)
    q, k, v = (torch.randn(27, heads, 32, generator=generator) for heads in (2, 1, 1))
    index = IndexerOutput(*(torch.randn(27, *shape, generator=generator) for shape in ((2, 16), (16,), (2,))))

    def stored(together: bool) -> list[torch.Tensor]:
        caches = [KVCache(2, KVStore(layout)) for _ in range(3)]
        spans = [Span(9 * i, 9 * i + 9, cache) for i, cache in enumerate(caches)]
        for part in [spans] if together else [[span] for span in spans]:
            CachedStep(part, config).attend(0, q, k, v, index)
        return [cache.read_range(0, name, 0, 9) for cache in caches for name in layout.rows]

    assert all(map(torch.equal, stored(True), stored(False)))
