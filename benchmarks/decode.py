"""One token at a time through layers of Keye-VL-2.0's width and its whole head: CPU time of one thread, beside the
bandwidth that the same run reads memory with.

    python -m benchmarks.decode                                         # plain bfloat16 weights, contexts 512 and 4096
    python -m benchmarks.decode --weights int4 --kv int4 --indexer-kv int8 --contexts 16384 131072
    python -m benchmarks.decode --weights int4 --indexer-kv int8 --contexts 40960

Weights are noise, each layer has its own, so that no cache can hold them; keys and values are noise too, and what the
indexer selects is spread over the whole context. Times are medians of steps. For each context:

* `ms`: layers and the whole head; `per_layer_ms`: a layer with its 48th of the head, `ratio_to_first`: tokens a second
  of such a model against those at the first context;
* `attention_ms`: of one layer, the kernel alone: scores of the indexer, top-k and attention over the set;
* `keys_values_ms`: reading all keys and values of a layer once at the measured bandwidth. `attention_share` is the
  former over the latter, `step_share` a step against one whose attention takes that time;
* `bandwidth_share`: weights that a step has to read, over bandwidth and time (bfloat16 only).

Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch
from torch import nn

from benchmarks.scale import DTYPE, fill, machine
from keye.cache.sequence import KVCache
from keye.cache.slabs import SLAB_BLOCKS, KVLayout, KVStore
from keye.config import TextConfig, load_model_config
from keye.hub import asset
from keye.models.attention import CachedStep, Span, cache_rows
from keye.ops import registry


def bandwidth(nbytes: int = 1 << 29) -> float:
    """Bytes a second that one thread reads from memory: the best of a few sums."""
    x, best = torch.ones(nbytes // 4), float("inf")
    for _ in range(4):
        begin = time.process_time()
        x.sum()
        best = min(best, time.process_time() - begin)
    return nbytes / best


def read_bytes(text: TextConfig, network: nn.Module) -> int:
    """Bytes of plain weights that one token reads: of the experts only the chosen ones."""
    total = 0
    for name, parameter in network.named_parameters():
        if "experts" in name:
            total += parameter.nbytes * text.num_experts_per_tok // text.num_experts
        elif "embed_tokens" not in name:
            total += parameter.nbytes
    return total


@contextmanager
def timed_attention(seconds: list[float]) -> Iterator[None]:
    """Adds the CPU seconds of every call of an attention kernel."""
    before = registry.sparse_attention, registry.dense_attention

    def timed(function: Any) -> Any:
        def run(*arguments: Any) -> None:
            begin = time.process_time()
            function(*arguments)
            seconds.append(time.process_time() - begin)

        return run

    registry.sparse_attention, registry.dense_attention = map(timed, before)  # type: ignore[assignment]
    try:
        yield
    finally:
        registry.sparse_attention, registry.dense_attention = before  # type: ignore[assignment]


def median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def measure(text: TextConfig, network: Any, layout: KVLayout, context: int, count: int) -> dict[str, float]:
    """Median seconds of `count` tokens behind a context of noise: the layers, the head, and attention of a layer."""
    slab = SLAB_BLOCKS * 48 // text.num_hidden_layers  # slabs as large as those of all layers, in as large pages
    cache = KVCache(text.num_hidden_layers, KVStore(layout, slab_blocks=slab))
    fill(cache, context)
    x, layers, head, attention = torch.randn(1, text.hidden_size), [], [], list[float]()
    with timed_attention(attention):
        for step in range(count):
            x = 0.9 * x + 0.19**0.5 * torch.randn_like(x)  # neighbouring tokens resemble one another
            position = torch.full((3, 1), context + step)
            begin = time.process_time()
            hidden = network.model(x.to(DTYPE), position, CachedStep([Span(0, 1, cache)], text))
            between = time.process_time()
            network.lm_head(hidden)
            head.append(time.process_time() - between)
            layers.append(between - begin)
    cache.free()
    warm = 2 * text.num_hidden_layers  # the first steps meet cold code
    return {"layers": median(layers[2:]), "head": median(head[2:]), "attention": median(attention[warm:])}


def main() -> None:
    from benchmarks.quant_model import build  # which takes `bandwidth` from here

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="bfloat16", help="bfloat16, int8 or int4")
    parser.add_argument("--head", help="format of the head (default: that of --weights)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--indexer-kv", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON; this is the only form there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    published = load_model_config(asset("configs/2.0")).text
    text = replace(published, num_hidden_layers=options.layers)
    network, rate = build(text, options.weights, options.head or options.weights), bandwidth()
    layout = KVLayout.of(cache_rows(text), DTYPE, options.kv, options.indexer_kv)
    row_bytes = layout.rows["k"].row_bytes + layout.rows["v"].row_bytes
    contexts: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for context in options.contexts:
            times = measure(text, network, layout, context, options.steps)
            total, keys_values = times["layers"] + times["head"], context * row_bytes / rate
            layer = times["layers"] / options.layers + times["head"] / published.num_hidden_layers
            contexts[context] = {
                "ms": total * 1e3, "head_ms": times["head"] * 1e3, "per_layer_ms": layer * 1e3,
                "attention_ms": times["attention"] * 1e3, "keys_values_ms": keys_values * 1e3,
                "attention_share": times["attention"] / keys_values,
                "step_share": layer / (layer - times["attention"] + keys_values),
            }  # fmt: skip
            contexts[context]["ratio_to_first"] = contexts[options.contexts[0]]["per_layer_ms"] / (layer * 1e3)
            if options.weights == "bfloat16":
                contexts[context]["bandwidth_share"] = read_bytes(text, network) / rate / total
    rounded = {c: {name: round(value, 3) for name, value in row.items()} for c, row in contexts.items()}
    print(json.dumps({
        "benchmark": "decode", "weights": options.weights, "layers": options.layers, "kv": options.kv,
        "indexer_kv": options.indexer_kv, "machine": machine(), "read_gb_per_second": round(rate / 1e9, 1),
        "contexts": rounded,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
