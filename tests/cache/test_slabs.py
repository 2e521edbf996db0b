"""The store of keys and values: blocks are shared, counted and released; the ledger knows every byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.cache.ledger import Ledger, OutOfMemory
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.errors import KeyeError
from keye.ops.kv_blocks import KV_BLOCK, RowFormat, RowKind
from tests.support.rows import kv_layout, kv_rows

LAYERS = 2


def make_store(budget: int | None = None, kind: RowKind = "float32", slab_blocks: int = 2) -> KVStore:
    layout = kv_layout(LAYERS, RowFormat(kind, 2, 8), RowFormat("float32", 1, 4))
    return KVStore(layout, ledger=Ledger(budget), slab_blocks=slab_blocks)


def fill(cache: KVCache, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=generator) for shape in ((tokens, 2, 8), (tokens, 2, 8), (tokens, 4))]
    for layer in range(LAYERS):
        cache.append(layer, kv_rows(*parts))
    return parts


def test_a_fork_shares_full_blocks_and_copies_the_last() -> None:
    store = make_store()
    cache = KVCache(LAYERS, store)
    fill(cache, 2 * KV_BLOCK + 5)
    before = store.nbytes()
    fork = cache.fork()
    assert store.nbytes() - before <= store.layout.block_bytes * 2, "one block more, in at most one slab"
    shared = cache.layer_blocks(0), fork.layer_blocks(0)
    assert shared[0] is not None and shared[1] is not None
    ours, theirs = shared[0]["k"].addresses, shared[1]["k"].addresses
    assert ours is not None and theirs is not None
    assert (ours == theirs).tolist() == [True, True, False]


def test_everything_is_released() -> None:
    store = make_store()
    cache = KVCache(LAYERS, store)
    fill(cache, 3 * KV_BLOCK)
    fork = cache.fork()
    cache.free()
    assert store.ledger.used() > 0, "the fork still holds its blocks"
    alone = fill(KVCache(LAYERS, make_store()), 3 * KV_BLOCK)
    assert torch.equal(fork.read(0, "k", torch.arange(3 * KV_BLOCK)), alone[0])
    del fork
    assert store.ledger.used() == 0


def test_a_budget_that_is_too_small_takes_nothing() -> None:
    store = make_store()
    store.ledger.budget = 4 * store.layout.block_bytes
    cache = KVCache(LAYERS, store)
    fill(cache, KV_BLOCK)
    with pytest.raises(OutOfMemory, match="budget"):
        cache.reserve(5 * KV_BLOCK)
    assert cache.blocks == 1
    assert store.room() == 3 * KV_BLOCK
    cache.reserve(4 * KV_BLOCK)
    assert store.room() == 0


@given(st.lists(st.tuples(st.sampled_from(["append", "fork", "free", "truncate"]), st.integers(1, 150)), max_size=20))
@settings(max_examples=40, deadline=None)
def test_any_history_ends_at_zero(history: list[tuple[str, int]]) -> None:
    store = make_store()
    caches = [KVCache(LAYERS, store)]
    for what, number in history:
        cache = caches[number % len(caches)]
        if what == "append":
            fill(cache, number)
        elif what == "fork":
            caches.append(cache.fork())
        elif what == "free":
            cache.free()
        else:
            length = min(number, cache.length(0)) // KV_BLOCK * KV_BLOCK
            cache.truncate(length)
        assert all(c.length(0) == c.length(1) for c in caches)
    for cache in caches:
        cache.free()
    assert store.ledger.used() == 0
    assert store.nbytes() == 0


@pytest.mark.parametrize(
    ("kind", "worst"), [("bfloat16", 0.004), ("float16", 0.0005), ("fp8", 0.04), ("int8", 0.012), ("int4", 0.16)]
)
def test_stored_rows_come_back_within_the_format(kind: RowKind, worst: float) -> None:
    rows = RowFormat(kind, 4, 128)
    x = torch.randn(200, 4, 128, generator=torch.Generator().manual_seed(0))
    encoded = rows.encode(x)
    assert encoded.shape == (200, rows.row_bytes)
    error = (rows.decode(encoded, torch.float32) - x).norm(dim=-1) / x.norm(dim=-1)
    assert error.max() < worst


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_zeros_and_large_numbers_survive(kind: RowKind) -> None:
    rows = RowFormat(kind, 1, 16)
    x = torch.stack((torch.zeros(1, 16), torch.full((1, 16), 3e4), torch.full((1, 16), -1e-6)))
    back = rows.decode(rows.encode(x), torch.float32)
    assert torch.equal(back[0], x[0])
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back[1], x[1], rtol=0.05, atol=0)


def test_int4_uses_all_sixteen_codes_and_scales_of_either_sign() -> None:
    rows = RowFormat("int4", 2, 64)
    x = torch.randn(500, 2, 64, generator=torch.Generator().manual_seed(0))
    encoded = rows.encode(x)
    heads = encoded.unflatten(1, (2, rows.head_bytes))
    codes = torch.cat((heads[..., :32] & 15, heads[..., :32] >> 4), dim=-1)
    assert codes.unique().tolist() == list(range(16))
    scales = heads[..., 32:].contiguous().view(torch.bfloat16)
    assert 0.4 < (scales < 0).float().mean() < 0.6
    assert (rows.decode(encoded, torch.float32) - x).norm() / x.norm() < 0.092, "largest number over 7 gives 0.108"


def test_int4_rows_do_not_depend_on_their_neighbours() -> None:
    rows = RowFormat("int4", 2, 64)
    x = torch.randn(600, 2, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows.encode(x)[300:], rows.encode(x[300:]))


def test_int4_takes_little_room() -> None:
    assert RowFormat("bfloat16", 4, 128).row_bytes / RowFormat("int4", 4, 128).row_bytes >= 3.6


def test_formats_that_do_not_exist_are_named() -> None:
    with pytest.raises(KeyeError, match="power of two"):
        RowFormat("int4", 1, 24)
    with pytest.raises(KeyeError, match="'int3'.*choose one of"):
        RowFormat("int3", 1, 8)  # type: ignore[arg-type]


def test_a_cache_collected_in_the_middle_of_an_entry_does_not_lock_up() -> None:
    store = make_store()
    cache = KVCache(LAYERS, store)
    fill(cache, KV_BLOCK)

    class Budget(int):
        """Collects the cache while the ledger reads its budget."""

        def __sub__(self, other: int) -> int:
            nonlocal cache
            cache = KVCache(LAYERS, store)
            return int(self) - other

    store.ledger.budget = Budget(1 << 30)
    store.ledger.reserve("vision", 10)
    store.ledger.release("vision", 10)
    assert store.ledger.used() == 0
