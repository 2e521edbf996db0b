"""A model names its cached rows; stores, formats, files and preemption work with whatever names it has."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keye.cache.index_file import VERSION, check_full, open_mapped, read_index_file, write_index_file
from keye.cache.ledger import Ledger
from keye.cache.saved import SavedCaches
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVFormat, KVLayout, KVOptions
from keye.errors import KeyeError
from keye.ops.kv_blocks import KV_BLOCK, RowSpec

LAYERS, TOKENS = 3, 2 * KV_BLOCK + 9
#: Rows of latent attention, and a scanned row as an indexer of it would have.
SPECS = {
    "latent": RowSpec(LAYERS, 1, 64), "rope_k": RowSpec(LAYERS, 1, 16), "indexer_k": RowSpec(LAYERS, 2, 8, scanned=True)
}  # fmt: skip
ALL = torch.arange(TOKENS)
OLD = Path(__file__).parents[1] / "golden" / "index" / "version_1.keye.gz"


def fill(cache: KVCache, start: int = 0) -> list[dict[str, Tensor]]:
    """Random rows of every layer, as they were appended."""
    generator = torch.Generator().manual_seed(start)
    layers = []
    for layer in range(LAYERS):
        shapes = {name: (TOKENS, spec.heads, spec.dim) for name, spec in SPECS.items()}
        layers.append({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        cache.append(layer, layers[-1])
    return layers


def read_all(cache: KVCache) -> list[dict[str, Tensor]]:
    return [{name: cache.read(layer, name, ALL) for name in SPECS} for layer in range(LAYERS)]


def assert_near(cache: KVCache, expected: list[dict[str, Tensor]], error: float) -> None:
    for stored, rows in zip(read_all(cache), expected, strict=True):
        for name in SPECS:
            assert (stored[name] - rows[name]).norm() <= error * rows[name].norm()


@pytest.mark.parametrize("tier", ["memory", "file"])
@pytest.mark.parametrize(("kv", "error"), [("auto", 0), ("bf16", 0.004), ("int8", 0.01), ("int4", 0.15)])
def test_rows_are_stored_in_every_format_and_tier(tier: str, kv: KVFormat, error: float, tmp_path: Path) -> None:
    options = KVOptions(kv, tier=tier, folder=tmp_path if tier == "file" else None)  # type: ignore[arg-type]
    ledger = Ledger()
    cache = KVCache(LAYERS, options.store(options.layout(SPECS, torch.float32), "cpu", ledger))
    assert_near(cache, fill(cache), error)
    assert cache.store is not None
    assert cache.store.layout.rows["indexer_k"].kind == "float32", "scanned rows have a format of their own"
    assert cache.store.accounts == {"memory": {"kv": 0}, "file": {"kv": 0, "kv-file": 0}}[tier].keys()
    blocks = cache.layer_blocks(1)
    assert blocks is not None and set(blocks) == set(SPECS)
    assert {name for name, rows in blocks.items() if rows.mapped} == ({"latent", "rope_k"} if tier == "file" else set())
    cache.free()
    assert ledger.used() == 0


def test_saved_sequences_come_back(tmp_path: Path) -> None:
    cache = KVCache(LAYERS, KVOptions().store(KVLayout.of(SPECS, torch.float32, "int8"), "cpu"))
    fill(cache)
    before = read_all(cache)
    fork = cache.fork(KV_BLOCK + 3)
    saved = SavedCaches.save([cache, fork], tmp_path)
    cache.free()
    fork.free()
    cache, fork = saved.restore()
    for old, new in zip(before, read_all(cache), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in SPECS)
    start = fork.read_range(2, "latent", 0, KV_BLOCK + 3)
    assert torch.equal(start, before[2]["latent"][: KV_BLOCK + 3])


def test_an_index_file_holds_the_rows_by_name(tmp_path: Path) -> None:
    path, tokens = tmp_path / "latent.keye", torch.arange(4 * TOKENS).view(4, TOKENS)
    layout = KVLayout.of(SPECS, torch.float32, "int8", "bf16")
    cache = KVCache(LAYERS, KVOptions().store(layout, "cpu"))
    fill(cache)
    write_index_file(path, cache, tokens, {"by": "a test"})
    file, mapped, check = open_mapped(path)
    assert (file.layout.rows, file.layout.scanned) == (layout.rows, layout.scanned)
    assert torch.equal(file.tokens, tokens) and file.about == {"by": "a test"}
    store = KVOptions().store(file.layout, "cpu")
    past = KVCache.of_blocks(store, store.adopt(file.rows(mapped), file.blocks), file.length, check)
    for old, new in zip(read_all(cache), read_all(past), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in SPECS)
    check.compare_reads(0, list(SPECS))
    assert past.damage is None and check_full(path).length == TOKENS
    data = bytearray(path.read_bytes())
    data[file.sections["rope_k"].offset + file.layout.rows["rope_k"].block_bytes + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(KeyeError, match=r"is damaged \(KV block 1 of its rope_k differs from its checksum\)"):
        check_full(path)


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    """A file that keye 0.1.0 wrote: two layers of 70 tokens, keys and values [2, 8] and indexer keys [4]."""
    path = tmp_path / "old.keye"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    file, mapped, check = open_mapped(path)
    assert VERSION == 2 and file.about == {"keye": "0.1.0"}
    assert list(file.layout.rows) == ["indexer_k", "k", "v"] and tuple(file.layout.scanned) == ("indexer_k",)
    assert torch.equal(file.tokens, torch.arange(280).view(4, 70))
    store = KVOptions().store(file.layout, "cpu")
    cache = KVCache.of_blocks(store, store.adopt(file.rows(mapped), file.blocks), file.length, check)
    shapes = {"k": (70, 2, 8), "v": (70, 2, 8), "indexer_k": (70, 1, 4)}
    for layer in range(2):
        for name, base in (("k", 0), ("v", 100), ("indexer_k", 200)):
            rows = torch.arange(torch.Size(shapes[name]).numel()).view(shapes[name]) / 8 + base + layer
            assert torch.equal(cache.read_range(layer, name, 0, 70), rows)
    assert check_full(path).length == read_index_file(path).length == 70
