"""One token at a time through layers of Keye-VL-2.0's width: CPU time of one thread, beside the bandwidth that the same
run reads memory with.

    python -m benchmarks.decode --json [--layers 4] [--contexts 512 4096]

Weights are noise, each layer has its own, and the head is whole: what no cache can hold. Times are medians of steps;
bandwidth is that of summing a large tensor. `bytes` are those that a step has to read of weights, so that `bandwidth
share` is how near the step comes to what the memory gives.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch
from torch import Tensor, nn

from benchmarks.scale import DTYPE, fill, machine, random_decoder
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore
from keye.config import TextConfig, load_model_config
from keye.hub import asset
from keye.models.attention import CachedStep, Span, cache_rows
from keye.models.keye import Decoder
from keye.models.layers import Linear
from keye.planning.measure import fill_with_noise


def bandwidth(nbytes: int = 1 << 29) -> float:
    """Bytes a second that one thread reads from memory: the best of a few sums."""
    x, best = torch.ones(nbytes // 4), float("inf")
    for _ in range(4):
        begin = time.process_time()
        x.sum()
        best = min(best, time.process_time() - begin)
    return nbytes / best


def head(text: TextConfig) -> nn.Module:
    layer = Linear(text.hidden_size, text.vocab_size, bias=False).to(DTYPE)
    fill_with_noise(layer)
    return layer


def read_bytes(text: TextConfig, decoder: Decoder, output: nn.Module) -> int:
    """Bytes of weights that one token reads: of the experts only the chosen ones."""
    total = sum(p.nbytes for p in output.parameters())
    for name, parameter in decoder.named_parameters():
        if "experts" in name:
            total += parameter.nbytes * text.num_experts_per_tok // text.num_experts
        elif "embed_tokens" not in name:
            total += parameter.nbytes
    return total


def steps(
    text: TextConfig, decoder: Decoder, output: nn.Module, context: int, kv: str, indexer_kv: str, count: int
) -> list[float]:
    """CPU seconds of each of `count` tokens behind a context of noise, and of the head."""
    store = KVStore(KVLayout.of(cache_rows(text), DTYPE, kv, indexer_kv))
    cache = KVCache(text.num_hidden_layers, store)
    fill(cache, context)
    x, seconds = torch.randn(1, text.hidden_size), []
    for step in range(count):
        x = 0.9 * x + 0.19**0.5 * torch.randn_like(x)  # neighbouring tokens resemble one another
        position = torch.full((3, 1), context + step)
        begin = time.process_time()
        hidden: Tensor = decoder(x.to(DTYPE), position, CachedStep([Span(0, 1, cache)], text))
        output(hidden)
        seconds.append(time.process_time() - begin)
    cache.free()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--indexer-kv", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON; this is the only form there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = replace(load_model_config(asset("configs/2.0")).text, num_hidden_layers=options.layers)
    decoder, output = random_decoder(replace(text, vocab_size=8)), head(text)
    reads, rate = read_bytes(text, decoder, output), bandwidth()
    result: dict[str, Any] = {
        "benchmark": "decode", "layers": options.layers, "kv": options.kv, "indexer_kv": options.indexer_kv,
        "machine": machine(), "read_gb_per_second": round(rate / 1e9, 1), "weights_mb": round(reads / 1e6),
        "contexts": {},
    }  # fmt: skip
    with torch.inference_mode():
        for context in options.contexts:
            times = sorted(steps(text, decoder, output, context, options.kv, options.indexer_kv, options.steps)[2:])
            median = times[len(times) // 2]
            result["contexts"][context] = {
                "ms": round(median * 1e3, 2), "fastest_ms": round(times[0] * 1e3, 2),
                "slowest_ms": round(times[-1] * 1e3, 2), "bandwidth_share": round(reads / rate / median, 3),
            }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
