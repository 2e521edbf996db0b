"""256K tokens on one machine: the memory bound, end to end, at the real width of Keye-VL-2.0-30B-A3B.

    python -m benchmarks.scale prefill --json     # all tokens through 2 layers of real width
    python -m benchmarks.scale decode --json      # one token after another through all 48 layers, K/V in a mapped file

Weights are random (one layer's, shared by all layers of the decode: 48 of them would not fit), keys and values of the
decode are noise. Decode writes its store first and asks for the room on disk that it needs. Prints JSON: seconds,
tokens a second, and the process's anonymous memory (which cannot be released) beside its mapped pages of files.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore, file_slabs
from keye.config import TextConfig, load_model_config
from keye.engine.step import ALONE_TOKENS
from keye.hub import asset
from keye.models.attention import CachedStep, Span, cache_rows
from keye.models.keye import Decoder
from keye.models.moe import lay_out_for_decoding
from keye.ops.kv_blocks import KV_BLOCK
from keye.planning.measure import fill_with_noise

GIB = 2**30
DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prefill", "decode"])
    parser.add_argument("--length", type=int, default=262144, help="tokens of context")
    parser.add_argument("--layers", type=int, help="default: 2 for prefill, 48 for decode")
    parser.add_argument("--steps", type=int, default=8, help="tokens to decode")
    parser.add_argument("--kv", default="auto", help="auto (bf16), fp8, int8 or int4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where the store of the decode is written")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, progress to standard error")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    total = load_model_config(asset("configs/2.0")).text
    with torch.inference_mode():
        result = (prefill if options.what == "prefill" else decode)(total, options)
    result |= {"what": options.what, "length": options.length, "kv": options.kv, "threads": options.threads}
    print(json.dumps({**result, "machine": machine()}))


def prefill(text: TextConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Every token through `layers` layers of their own weights, in the engine's chunks."""
    text = replace(text, num_hidden_layers=options.layers or 2, vocab_size=8)
    decoder = random_decoder(text)
    store = KVStore(KVLayout.of(cache_rows(text), DTYPE, options.kv))
    cache = KVCache(text.num_hidden_layers, store)
    weights = sum(p.numel() for p in decoder.parameters()) * DTYPE.itemsize
    usage, begin, seconds = memory()["anonymous_gib"], time.perf_counter(), list[float]()
    for start in range(0, options.length, ALONE_TOKENS):
        n = min(ALONE_TOKENS, options.length - start)
        chunk = time.perf_counter()
        x = torch.randn(n, text.hidden_size).to(DTYPE)
        positions = torch.arange(start, start + n).expand(3, -1)
        decoder(x, positions, CachedStep([Span(0, n, cache)], text))
        seconds.append(time.perf_counter() - chunk)
        log(f"{start + n:,} tokens, {seconds[-1]:.2f} s for the last {n:,}")
    total = time.perf_counter() - begin
    stored = store.nbytes() / GIB
    return {
        "layers": text.num_hidden_layers, "seconds": round(total, 1),
        "tokens_per_second": round(options.length / total, 1),
        "chunk_seconds": {"first": round(seconds[0], 3), "middle": round(seconds[len(seconds) // 2], 3),
                          "last": round(seconds[-1], 3)},
        "weights_gib": round(weights / GIB, 2), "store_gib": round(stored, 2),
        "scratch_mib": round((peak_gib() - usage - stored) * 1024, 1),
    }  # fmt: skip


def decode(text: TextConfig, options: argparse.Namespace) -> dict[str, Any]:
    """`steps` tokens after a full context whose keys and values lie in a mapped file."""
    text = replace(text, num_hidden_layers=options.layers or text.num_hidden_layers, vocab_size=8)
    decoder = shared_decoder(text)
    layout = KVLayout.of(cache_rows(text), DTYPE, options.kv)
    need = -(-options.length // KV_BLOCK) * layout.block_bytes
    free = shutil.disk_usage(options.folder).free
    if need * 1.05 > free:
        sys.exit(f"the store takes {need / GIB:.1f} GiB, but {options.folder} has {free / GIB:.1f} GiB free; "
                 "name another --folder, a smaller --length, or --kv int4")  # fmt: skip
    store = KVStore(layout, make_slab=file_slabs(options.folder), slab_blocks=64)
    cache = KVCache(text.num_hidden_layers, store)
    begin = time.perf_counter()
    fill(cache, options.length)
    filled = time.perf_counter() - begin
    x, seconds, usage = torch.randn(1, text.hidden_size), list[float](), 0.0
    for step in range(options.steps):
        # Neighbouring tokens resemble one another, and so do the keys that they select.
        x = 0.9 * x + 0.19**0.5 * torch.randn_like(x)
        position = torch.full((3, 1), options.length + step)
        start = time.perf_counter()
        decoder(x.to(DTYPE), position, CachedStep([Span(0, 1, cache)], text))
        seconds.append(time.perf_counter() - start)
        usage = max(usage, memory()["anonymous_gib"])
        log(f"token {step + 1}: {seconds[-1]:.2f} s, {usage:.2f} GiB of anonymous memory")
    later = sorted(seconds[1:])
    near = cache.blocks * layout.scanned_block_bytes / GIB
    weights = sum(p.numel() for p in decoder.parameters()) * DTYPE.itemsize / GIB
    return {
        "weights_gib": round(weights, 2), "indexer_keys_gib": round(near, 2), "anonymous_gib_while_decoding": usage,
        "layers": text.num_hidden_layers, "store_gib": round(need / GIB, 2), "fill_seconds": round(filled, 1),
        "first_token_seconds": round(seconds[0], 3), "median_token_seconds": round(later[len(later) // 2], 3),
        "fastest_token_seconds": round(later[0], 3), "slowest_token_seconds": round(later[-1], 3),
    }  # fmt: skip


def random_decoder(text: TextConfig) -> Decoder:
    """A decoder without vocabulary, its weights noise."""
    with torch.device("meta"):
        decoder = Decoder(text)
        lay_out_for_decoding(decoder, "cpu", DTYPE)
    decoder.to_empty(device="cpu").to(DTYPE)
    fill_with_noise(decoder)
    return decoder


def shared_decoder(text: TextConfig) -> Decoder:
    """All layers with the weights of one: they differ by their number alone."""
    decoder = random_decoder(replace(text, num_hidden_layers=1))
    (first,) = decoder.layers
    decoder.layers = nn.ModuleList(_renumbered(first, i) for i in range(text.num_hidden_layers))
    return decoder


def _renumbered(layer: Any, number: int) -> Any:
    clone, attention = copy.copy(layer), copy.copy(layer.self_attn)
    clone._modules = {**layer._modules, "self_attn": attention}
    clone.layer = attention.layer = number
    return clone


def fill(cache: KVCache, length: int) -> None:
    """Noise in every block: drawn once for each name of rows, and shifted from layer to layer and block to block."""
    store = cache.store
    assert store is not None
    layout = store.layout
    cache.reserve(length + 64)
    noise = {
        name: rows.encode(torch.randn(4 * KV_BLOCK, rows.heads, rows.dim).to(DTYPE))
        for name, rows in layout.rows.items()
    }
    for number, block in enumerate(cache.block_table):
        for name, rows in noise.items():
            for layer in range(layout.layers):
                at = (number * 29 + layer * 7) % (3 * KV_BLOCK)
                block.slab.rows[name][layer, block.slot].copy_(rows[at : at + KV_BLOCK])
        if number % 256 == 255:
            log(f"{(number + 1) * KV_BLOCK:,} tokens stored")
    cache._lengths = [length] * layout.layers


def memory() -> dict[str, float]:
    """GiB of this process: anonymous memory, and mapped pages of files, which the system may take back."""
    status = dict(_status())
    return {"anonymous_gib": round(status["RssAnon"] / GIB, 3), "mapped_gib": round(status["RssFile"] / GIB, 3)}


def peak_gib() -> float:
    """The most that the process has held, files included; of a process that maps few files, its anonymous memory."""
    return dict(_status())["VmHWM"] / GIB


def _status() -> Iterator[tuple[str, int]]:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            yield name, int(value.split()[0]) * 1024


def machine() -> str:
    """The processor, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
