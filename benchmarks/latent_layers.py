"""Two layers of the width of Keye-VL-671B, a dense and a routed one, with random weights: CPU time of one thread.

    python -m benchmarks.latent_layers [--weights int4] [--experts 64] [--lengths 512 4096]

A routed layer of the model has 256 experts, 11.3 billion numbers; `--experts` of them are built, in 8 groups as there,
and 8 work on a token as there. So decoding reads as much as in the model; a short prefill reads fewer experts than it
would there. Weights are random codes in the formats of `keye quantize --to`, or `--weights bfloat16`. Each layer is
timed alone, and latent attention by itself in both forms of `keye.ops.latent`. `model_decode_ms` adds up 3 dense and 58
routed layers, without the head. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch

from benchmarks.quant_model import Network, build
from benchmarks.scale import DTYPE, fill, machine, peak_gib
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore
from keye.config import TextConfig, load_model_config
from keye.engine.step import ALONE_TOKENS
from keye.hub import asset
from keye.models.attention import CachedStep, Span, cache_rows
from keye.ops.latent import Form, LatentQuery, latent_attention

#: Layers of the model that are dense, and that route.
DENSE: Final = 3
ROUTED: Final = 58
STEPS: Final = 5


def geometry(experts: int) -> tuple[TextConfig, TextConfig]:
    """One dense and one routed layer of the published sizes, the routed one with so many experts."""
    text = replace(load_model_config(asset("configs/671b")).text, num_hidden_layers=1, vocab_size=8)
    dense = replace(text, num_experts=0, n_shared_experts=0, group_routing=None)
    return dense, replace(text, num_experts=experts, mlp_only_layers=())


def run_layer(network: Network, text: TextConfig, cache: KVCache, start: int, tokens: int) -> float:
    """CPU seconds of so many tokens behind `start`."""
    x = torch.randn(tokens, text.hidden_size).to(DTYPE)
    positions = torch.arange(start, start + tokens).expand(3, -1)
    begin = time.process_time()
    network.model(x, positions, CachedStep([Span(0, tokens, cache)], text))
    return time.process_time() - begin


def prefill(network: Network, text: TextConfig, store: KVStore, length: int) -> float:
    """CPU seconds of a prompt in the chunks of the engine; the better of two."""
    seconds = []
    for _ in range(2):
        cache = KVCache(1, store)
        chunks = [(at, min(ALONE_TOKENS, length - at)) for at in range(0, length, ALONE_TOKENS)]
        seconds.append(sum(run_layer(network, text, cache, at, tokens) for at, tokens in chunks))
        cache.free()
    return min(seconds)


def decode(network: Network, text: TextConfig, store: KVStore, length: int) -> float:
    """CPU seconds of a token behind `length` others: the median of a few."""
    cache = KVCache(1, store)
    fill(cache, length)
    times = sorted(run_layer(network, text, cache, length + i, 1) for i in range(STEPS))
    cache.free()
    return times[len(times) // 2]


def attention(text: TextConfig, tokens: int, length: int, form: Form) -> float:
    """CPU seconds of the attention of `tokens` queries over `length` keys, in one form."""
    latent = text.latent
    assert latent is not None
    H, width = text.num_attention_heads, latent.qk_nope_head_dim + latent.v_head_dim
    nope, rope = (torch.randn(tokens, H, dim).to(DTYPE) for dim in (latent.qk_nope_head_dim, latent.qk_rope_head_dim))
    weight = (torch.randn(H, width, latent.kv_lora_rank) * latent.kv_lora_rank**-0.5).to(DTYPE)
    rows = torch.randn(length, latent.kv_lora_rank).to(DTYPE), torch.randn(length, latent.qk_rope_head_dim).to(DTYPE)
    query = LatentQuery(nope, rope, weight, text.head_dim**-0.5)
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        latent_attention(query, lambda start, stop: (rows[0][start:stop], rows[1][start:stop]), length - tokens, form)
        seconds.append(time.process_time() - begin)
    return min(seconds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int4", choices=["int4", "int8", "bfloat16"])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--kv", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = dict(zip(("dense", "routed"), geometry(options.experts), strict=True))
    networks = {name: build(text, options.weights, options.weights) for name, text in texts.items()}
    store = KVStore(KVLayout.of(cache_rows(texts["dense"]), DTYPE, options.kv))
    result: dict[str, Any] = {}
    for length in options.lengths:
        seconds = {name: (prefill(networks[name], text, store, length), decode(networks[name], text, store, length))
                   for name, text in texts.items()}  # fmt: skip
        decoded = DENSE * seconds["dense"][1] + ROUTED * seconds["routed"][1]
        result[str(length)] = {
            **{f"{name}_prefill_tokens_per_second": round(length / both[0], 1) for name, both in seconds.items()},
            **{f"{name}_decode_ms": round(both[1] * 1e3, 1) for name, both in seconds.items()},
            "model_decode_ms": round(decoded * 1e3), "attention_ms": attention_times(texts["routed"], length),
        }  # fmt: skip
    print(json.dumps({
        "weights": options.weights, "experts": options.experts, "kv": options.kv, "lengths": result,
        "peak_gib": round(peak_gib(), 2), "machine": machine(),
    }))  # fmt: skip


def attention_times(text: TextConfig, length: int) -> dict[str, float]:
    """Milliseconds in each form: of a token, and of the last chunk of a prompt."""
    forms: tuple[Form, ...] = ("absorbed", "expanded")
    cases = {"token": 1, "chunk": min(length, ALONE_TOKENS)}
    return {f"{name} {form}": round(attention(text, tokens, length, form) * 1e3, 1)
            for name, tokens in cases.items() for form in forms}  # fmt: skip


if __name__ == "__main__":
    main()
