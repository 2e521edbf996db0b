"""Reservations that do not fit evict what caches keep: in order, within one budget, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from keye.cache.ledger import Ledger, OutOfMemory
from keye.cache.prefix import MediaSpans, PrefixCache
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.cache.vision import VisionCache
from keye.ops.kv_blocks import KV_BLOCK, RowFormat
from tests.support.rows import kv_layout, kv_rows

ROWS = RowFormat("float32", 1, 8)


def entries(ledger: Ledger, account: str, count: int, nbytes: int = 10) -> Callable[[], bool]:
    """Reserves entries; returns the function that evicts one of them."""
    left = [nbytes] * count
    for size in left:
        ledger.reserve(account, size)

    def evict() -> bool:
        if left:
            ledger.release(account, left.pop())
            return True
        return False

    return evict


def make_store(ledger: Ledger, slab_blocks: int = 1) -> KVStore:
    return KVStore(kv_layout(1, ROWS), ledger=ledger, slab_blocks=slab_blocks)


def media(tokens: int) -> MediaSpans:
    """A medium of all but the first of so many tokens: a prefix is kept at its end alone."""
    return ((1, tokens, b"medium"),)


def keep(prefixes: PrefixCache, store: KVStore, tokens: int, first: int) -> torch.Tensor:
    """Keeps the first tokens, up to the end of a medium, of a prompt with one token more; returns its token ids."""
    cache, rows = KVCache(1, store), torch.full((tokens + 1, 1, 8), float(first))
    cache.append(0, kv_rows(rows, rows))
    ids = torch.arange(first, first + tokens + 1)
    prefixes.keep(ids, media(tokens), b"", cache)
    cache.free()
    return ids


def test_the_lowest_priority_is_evicted_first_and_only_as_far_as_needed() -> None:
    ledger = Ledger(100)
    ledger.register(entries(ledger, "late", 4), {"late"}, priority=1)
    ledger.register(entries(ledger, "early", 4), {"early"}, priority=0)
    ledger.reserve("kv", 50)
    assert ledger.accounts() == {"early": 10, "kv": 50, "late": 40}
    ledger.reserve("kv", 25)
    assert ledger.accounts() == {"kv": 75, "late": 20}
    with pytest.raises(OutOfMemory, match=r"for kv, but the memory budget is"):
        ledger.reserve("kv", 30)
    assert ledger.accounts() == {"kv": 75}


def test_separate_budgets_evict_only_what_counts_against_them() -> None:
    ledger = Ledger(100, separate={"kv-file": 50})
    ledger.register(entries(ledger, "vision-cache", 10), {"vision-cache"}, priority=0)
    ledger.register(entries(ledger, "kv-file", 5), {"kv", "kv-file"}, priority=1)
    ledger.reserve("kv-file", 10)
    assert ledger.accounts() == {"kv-file": 50, "vision-cache": 100}
    ledger.reserve("kv-saved", 10**9)
    assert ledger.used("vision-cache") == 100 and ledger.used("kv-file") == 50
    ledger.reserve("scratch", 100)
    assert ledger.used("vision-cache") == 0 and ledger.used("kv-file") == 50


def test_what_a_cache_keeps_does_not_evict_from_another() -> None:
    ledger = Ledger(1000)
    ledger.register(entries(ledger, "other", 100), {"other"}, priority=0)
    cache, tokens = VisionCache(2000, ledger), torch.zeros(5, 16)
    assert cache.put(b"a", tokens) is None
    assert ledger.accounts() == {"other": 1000}


def test_a_reservation_finds_the_blocks_that_an_eviction_freed() -> None:
    """Evicting a prefix may free blocks of a slab that others use too, and so no bytes at all."""
    ledger = Ledger()
    store = make_store(ledger, slab_blocks=4)
    prefixes = PrefixCache(store)
    other = KVCache(1, store)
    other.reserve(2 * KV_BLOCK)
    keep(prefixes, store, 2 * KV_BLOCK, 0)
    ledger.budget = store.slab_bytes
    wanted = KVCache(1, store)
    wanted.reserve(2 * KV_BLOCK)
    assert len(prefixes) == 0 and ledger.used() == store.slab_bytes
    with pytest.raises(OutOfMemory):
        wanted.reserve(3 * KV_BLOCK)
    assert wanted.blocks == 2


@pytest.mark.parametrize("room", [True, False])
def test_a_complete_prefix_is_found_without_room_for_a_copy(room: bool) -> None:
    """Its last block, which is not full, is copied for the one who continues it, or else handed over."""
    ledger = Ledger()
    store = make_store(ledger)
    prefixes = PrefixCache(store)
    ids = keep(prefixes, store, KV_BLOCK + 10, 3)
    ledger.budget = ledger.used() + (store.slab_bytes if room else 0)
    result = prefixes.find(ids, media(KV_BLOCK + 10), b"")
    assert result is not None and result.length(0) == KV_BLOCK + 10
    assert (result.read(0, "k", torch.arange(KV_BLOCK + 10)) == 3).all()
    assert len(prefixes) == room
    result.append(0, kv_rows(torch.ones(1, 1, 8), torch.ones(1, 1, 8)))
    prefixes.clear()
    result.free()
    assert ledger.accounts() == {}


def test_a_prefix_is_not_kept_at_the_cost_of_others() -> None:
    ledger = Ledger()
    store = make_store(ledger)
    prefixes, vision = PrefixCache(store), VisionCache(1 << 20, ledger)
    first = keep(prefixes, store, KV_BLOCK + 10, 0)
    assert vision.put(b"a", torch.zeros(100)) is not None
    vision.release(b"a")
    cache, rows = KVCache(1, store), torch.zeros(KV_BLOCK + 21, 1, 8)
    cache.append(0, kv_rows(rows, rows))
    ledger.budget = ledger.used()
    prefixes.keep(torch.arange(1000, 1000 + KV_BLOCK + 21), media(KV_BLOCK + 20), b"", cache)
    assert len(prefixes) == 1 and vision.nbytes() == 400
    assert prefixes.find(first, media(KV_BLOCK + 10), b"") is not None


def test_a_cache_that_evicts_itself_while_it_reserves_stays_whole() -> None:
    """The ledger calls a cache that is just making room for an entry of its own."""
    ledger = Ledger(1000)
    cache = VisionCache(10_000, ledger)
    for number in range(20):
        assert cache.put(number.to_bytes(1, "little"), torch.zeros(100)) is not None
        cache.release(number.to_bytes(1, "little"))
        assert cache.nbytes() == ledger.used("vision-cache") <= 1000
    ledger.reserve("scratch", 900)
    assert cache.nbytes() == 0


def test_threads_that_reserve_evict_from_one_another_without_deadlock() -> None:
    """Three kinds of work in a memory that holds little of each: no thread waits for ever, all bytes are released."""
    ledger = Ledger()
    store = make_store(ledger)
    prefixes, vision = PrefixCache(store), VisionCache(8 * store.slab_bytes, ledger)
    ledger.budget = 12 * store.slab_bytes
    failures: list[BaseException] = []

    def sequences(seed: int) -> None:
        for number in range(60):
            try:
                tokens = KV_BLOCK + 1 + number % 60
                ids = keep(prefixes, store, tokens, 1000 * seed + number)
                if (result := prefixes.find(ids, media(tokens), b"")) is not None:
                    result.free()
            except OutOfMemory:
                pass

    def visual_tokens(seed: int) -> None:
        for number in range(200):
            key = bytes((seed, number))
            if vision.put(key, torch.zeros(store.slab_bytes // 4)) is not None:
                assert vision.acquire(key) is not None
                vision.release(key)
                vision.release(key)

    def steps(_: int) -> None:
        for _ in range(200):
            if ledger.try_reserve("scratch", 3 * store.slab_bytes):
                ledger.release("scratch", 3 * store.slab_bytes)

    def guarded(work: Callable[[int], None], seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [
        threading.Thread(target=guarded, args=(work, seed), daemon=True)
        for work in (sequences, visual_tokens, steps)
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "threads wait for one another"
    assert not failures
    prefixes.clear()
    vision.clear()
    assert ledger.accounts() == {} and store.nbytes() == 0
