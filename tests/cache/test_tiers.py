"""Where keys and values lie changes neither tokens nor what the ledger says at the end."""

from __future__ import annotations

import mmap
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import keye
from keye import Frames, Keye, KeyeError
from keye.cache.ledger import Ledger, OutOfMemory
from keye.cache.mapped import scratch_tensor
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVFormat, KVOptions, KVStore, file_slabs
from keye.data.frameforge import make_clip, questions, render
from keye.models.keye import KeyeModel
from keye.ops.kv_blocks import KV_BLOCK, RowFormat
from keye.ops.mapped import fetch_rows
from tests.support.rows import kv_layout, kv_rows

FRAMES = Frames(np.random.default_rng(0).integers(0, 256, (6, 56, 56, 3), dtype=np.uint8), [i / 2 for i in range(6)])
LAYOUT = kv_layout(2, RowFormat("float32", 2, 8), RowFormat("float32", 1, 4))


@pytest.fixture
def load(folder: Path) -> Callable[..., Keye]:
    return lambda **options: keye.load(folder, **{"dtype": "float32", **options})


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int = 1 << 20) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def fill(cache: KVCache, tokens: int) -> torch.Tensor:
    keys = torch.randn(tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        cache.append(layer, kv_rows(keys, keys + 1, keys[:, 0, :4]))
    return keys


@pytest.mark.parametrize("kv", ["auto", "int8", "int4"])
def test_a_mapped_file_gives_the_same_tokens(tmp_path: Path, kv: KVFormat) -> None:
    memory, file = keye.load("nano", kv=kv), keye.load("nano", kv=kv, kv_tier="file", kv_folder=tmp_path)
    clip = make_clip(3, frames=8, objects=2)
    for question in questions(clip, random.Random(0), 2):
        events = [model.ask(Frames(render(clip), clip.timestamps), question.text).text for model in (memory, file)]
        assert events[0] == events[1] != ""
    assert file.runtime.store.layout == memory.runtime.store.layout
    for model in (memory, file):
        model.clear_caches()
        assert model.runtime.ledger.used() == 0


def test_keys_and_values_are_booked_aside_and_indexer_keys_near(tmp_path: Path) -> None:
    ledger = Ledger(budget=2 * LAYOUT.scanned_block_bytes)
    store = KVStore(LAYOUT, ledger=ledger, make_slab=file_slabs(tmp_path), slab_blocks=1)
    cache = KVCache(2, store)
    keys = fill(cache, KV_BLOCK + 1)
    near, far = 2 * LAYOUT.scanned_block_bytes, 2 * (LAYOUT.block_bytes - LAYOUT.scanned_block_bytes)
    assert ledger.accounts() == {"kv": near, "kv-file": far}
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    assert torch.equal(cache.read(1, "k", torch.tensor([KV_BLOCK, 3])), keys[[KV_BLOCK, 3]])
    assert store.room() == 0
    with pytest.raises(OutOfMemory, match="memory budget"):
        cache.reserve(3 * KV_BLOCK)
    cache.free()
    assert ledger.used() == 0 and store.room() == 2 * KV_BLOCK


def test_the_kernels_get_addresses_in_the_map(tmp_path: Path) -> None:
    cache = KVCache(2, KVStore(LAYOUT, make_slab=file_slabs(tmp_path), slab_blocks=2))
    fill(cache, 2 * KV_BLOCK)
    blocks = cache.layer_blocks(0)
    assert blocks is not None and set(blocks) == {"k", "v", "indexer_k"}
    for rows in blocks.values():
        assert rows.addresses is not None
        assert (rows.addresses[1] - rows.addresses[0]).item() == rows.format.block_bytes


def test_rows_are_asked_for_together_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request: list[tuple[int, int]] = []
    base = 0
    monkeypatch.setattr(
        "keye.ops.mapped._MADVISE", lambda start, nbytes, _: request.append((start - base, nbytes)) or 0
    )
    rows = scratch_tensor(tmp_path, (400, 272))
    base, page = rows.data_ptr(), mmap.PAGESIZE
    assert base % page == 0
    fetch_rows(rows, torch.tensor([0, 1, 399, page // 272]))
    assert request == [(0, 2 * page), (399 * 272 // page * page, page)], "a row over two pages, and one far away"
    request.clear()
    fetch_rows(rows, torch.arange(400))
    assert request == [(0, -(-400 * 272 // page) * page)], "neighbours are one run"


def test_a_budget_of_disk_is_one_of_its_own(tmp_path: Path) -> None:
    far = LAYOUT.block_bytes - LAYOUT.scanned_block_bytes
    store = KVStore(LAYOUT, ledger=Ledger(separate={"kv-file": 2 * far}), make_slab=file_slabs(tmp_path), slab_blocks=1)
    assert store.room() == 2 * KV_BLOCK
    with pytest.raises(OutOfMemory, match="for kv-file, but the disk budget is"):
        store.take(3)
    assert store.ledger.used() == 0


def test_a_full_disk_is_refused_before_any_work(
    load: Callable[..., Keye], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(kv_tier="file", kv_folder=tmp_path)
    full_disk(monkeypatch)

    def fail(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(KeyeModel, "encode_vision", fail)
    with pytest.raises(OutOfMemory, match="do not fit on the disk of .*free some, name a folder on another disk"):
        model.ask(FRAMES, "what?")
    assert model.runtime.ledger.used() == 0


def test_formats_change_what_a_token_takes(load: Callable[..., Keye]) -> None:
    sizes = [load(kv=kv).runtime.store.layout.token_bytes for kv in ("auto", "bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    layout = load(kv="int4", indexer_kv="fp8").runtime.store.layout
    assert (layout.kind, layout.rows["indexer_k"].kind) == ("int4", "fp8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv": "int3"}, "the key-value format is 'int3'; choose one of auto, bf16"),
        ({"indexer_kv": "int4"}, "indexer keys cannot be stored as int4"),
        ({"kv_tier": "tape"}, "kv_tier is 'tape'; choose one of memory, host, file"),
        ({"kv_folder": "/tmp"}, "kv_folder has no effect without kv_tier=file"),
    ],
)
def test_what_cannot_be_stored(load: Callable[..., Keye], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        load(**options)


def test_a_folder_that_is_not_there(load: Callable[..., Keye], tmp_path: Path) -> None:
    model = load(kv_tier="file", kv_folder=tmp_path / "none")
    with pytest.raises(KeyeError, match="none is not a folder"):
        model.ask(FRAMES, "what?")


def test_host_memory_beside_a_model_in_main_memory_is_that_memory() -> None:
    store = KVOptions(tier="host").store(LAYOUT, "cpu")
    fill(KVCache(2, store), 3)
    cache = KVCache(2, store)
    fill(cache, 3)
    assert store.ledger.accounts() == {"kv": store.slab_bytes}


def test_a_disk_that_fills_up_evicts_what_is_kept_for_later(tmp_path: Path) -> None:
    """No budget counts the disk: where it has no room for another slab, entries of caches are evicted."""
    maker, ledger = file_slabs(tmp_path), Ledger()

    def make(shape: Sequence[int]) -> torch.Tensor:
        if store.nbytes() >= 2 * store.slab_bytes:
            raise OutOfMemory("the disk is full")
        return maker.make(shape)

    store = KVStore(LAYOUT, ledger=ledger, make_slab=replace(maker, make=make), slab_blocks=1)
    evictable = [KVCache(2, store)]
    fill(evictable[0], 2 * KV_BLOCK)

    def evict() -> bool:
        return bool(evictable) and evictable.pop().free() is None

    ledger.register(evict, ("kv", "kv-file"), priority=0)
    cache = KVCache(2, store)
    fill(cache, KV_BLOCK)
    assert not evictable and cache.length(0) == KV_BLOCK
    with pytest.raises(OutOfMemory, match="the disk is full"):
        fill(KVCache(2, store), 2 * KV_BLOCK)
