"""Layers of Keye-VL-2.0's width and its whole head with quantised weights: prefill and decode, CPU time of one thread.

    python -m benchmarks.quant_model [--weights int4] [--head int4] [--layers 4] [--lengths 512 4096]

Weights are random codes, each layer has its own, in the formats of the policy that `keye quantize --to` uses;
`--weights bfloat16` measures plain ones beside. Prefill goes through the engine's chunks and asks the head about the
last token; decode times are medians. `decode_48_ms` adds up a model of 48 such layers, `decode_gb_per_second` are bytes
of weights over the time of a token, and `bandwidth_share` that over what the run reads memory with. Prints one JSON
object.
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
from torch import nn

from benchmarks.decode import bandwidth
from benchmarks.scale import DTYPE, fill, machine, peak_gib
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore
from keye.config import TextConfig, load_model_config
from keye.engine.step import ALONE_TOKENS
from keye.hub import asset
from keye.models.attention import CachedStep, Span, cache_rows
from keye.models.keye import Decoder
from keye.models.layers import Layer, Linear
from keye.models.load import replace_layers
from keye.models.moe import lay_out_for_decoding
from keye.models.quant_fill import quantize_layer
from keye.ops import registry
from keye.ops.quantized import QuantFormat
from keye.planning.measure import fill_with_noise
from keye.quant.layers import QuantizedWeight, pack_weights
from keye.quant.policy import make_policy, parse_part


class Network(nn.Module):
    """Decoder and head under their official names."""

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        self.model = Decoder(replace(text, vocab_size=8))  # embeddings are looked up: their size costs no time
        self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)


def build(text: TextConfig, weights: str, head: str) -> Network:
    """A network of noise in the formats that are asked for, packed."""
    with torch.device("meta"):
        network = Network(text)
    if weights != "bfloat16":
        policy = make_policy(weights, overrides=dict([parse_part(f"head={head.replace('bfloat16', 'keep')}")]))

        def quantise(name: str, layer: nn.Module) -> nn.Module:
            form = policy.format_of(f"{name}.weight")
            return layer if form is None or name.endswith("embed_tokens") else quantize_layer(layer, form)

        replace_layers(network, quantise)
    lay_out_for_decoding(network, "cpu", DTYPE)
    network = network.to(DTYPE).to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        parameter.data.fill_(1) if "norm" in name else fill_with_noise(_Holder(parameter))
    for module in network.modules():
        if isinstance(module, QuantizedWeight):
            fill_with_codes(module)
    pack_weights(network)
    small = registry.find_elementwise(torch.device("cpu"), text.hidden_size)
    for module in network.modules():
        if isinstance(module, Layer):
            module.elementwise = small
    return network.eval()


class _Holder(nn.Module):
    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def fill_with_codes(weight: QuantizedWeight) -> None:
    """Random codes, with scales that keep the size of activations."""
    tensor = weight.tensor
    codes = tensor.codes.view(torch.uint8)
    some = torch.randint(0, 256, (min(codes.numel(), 1 << 20),), dtype=torch.uint8)
    for at in range(0, codes.numel(), some.numel()):
        part = codes.view(-1)[at : at + some.numel()]
        part.copy_(some[: part.numel()])
    tensor.scales.fill_(step_of(tensor.format) / tensor.shape[-1] ** 0.5)


def step_of(form: QuantFormat) -> float:
    return 1 / 4.6 if form.kind == "int4" else 1 / 74


def read_bytes(network: Network, text: TextConfig) -> int:
    """Bytes of weights that one token reads: of the experts only the chosen ones."""
    sizes = {name: p.nbytes for name, p in network.named_parameters() if "embed_tokens" not in name}
    for name, weight in network.named_modules():
        if isinstance(weight, QuantizedWeight):
            sizes[name] = weight.packed.nbytes if weight.packed is not None else weight.tensor.nbytes
    return sum(
        n * text.num_experts_per_tok // text.num_experts if "experts" in name else n for name, n in sizes.items()
    )


def prefill(network: Network, text: TextConfig, cache: KVCache, length: int) -> float:
    """CPU seconds of a prompt."""
    x = torch.randn(length, text.hidden_size).to(DTYPE)
    begin = time.process_time()
    for start in range(0, length, ALONE_TOKENS):
        part = x[start : start + ALONE_TOKENS]
        positions = torch.arange(start, start + len(part)).expand(3, -1)
        hidden = network.model(part, positions, CachedStep([Span(0, len(part), cache)], text))
    network.lm_head(hidden[-1:])
    return time.process_time() - begin


def decode(network: Network, text: TextConfig, cache: KVCache, length: int, count: int) -> list[tuple[float, float]]:
    """CPU seconds of `count` tokens after `length`: those of the layers, and of the head."""
    seconds = []
    for step in range(count):
        x = torch.randn(1, text.hidden_size).to(DTYPE)
        position = torch.full((3, 1), length + step)
        begin = time.process_time()
        hidden = network.model(x, position, CachedStep([Span(0, 1, cache)], text))
        middle = time.process_time()
        network.lm_head(hidden).float()
        seconds.append((middle - begin, time.process_time() - middle))
    return seconds


def measure(
    network: Network, text: TextConfig, length: int, rate: float, options: argparse.Namespace
) -> dict[str, float]:
    """The best of some prompts, and the median token; `rate` is the bandwidth of the run."""
    store = KVStore(KVLayout.of(cache_rows(text), DTYPE, options.kv))
    seconds = []
    for _ in range(options.repeats):
        cache = KVCache(text.num_hidden_layers, store)
        seconds.append(prefill(network, text, cache, length))
        cache.free()
    cache = KVCache(text.num_hidden_layers, store)
    fill(cache, length)
    times = decode(network, text, cache, length, options.steps)[2:]
    cache.free()
    layers, head = (sorted(part)[len(times) // 2] for part in zip(*times, strict=True))
    read = read_bytes(network, text) / (layers + head)
    return {
        "prefill_tokens_per_second": round(length / min(seconds), 1),
        "decode_gb_per_second": round(read / 1e9, 1), "bandwidth_share": round(read / rate, 2),
        "decode_ms": round((layers + head) * 1e3, 2), "layer_ms": round(layers / text.num_hidden_layers * 1e3, 3),
        "head_ms": round(head * 1e3, 2), "decode_48_ms": round((48 * layers / text.num_hidden_layers + head) * 1e3, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int4", choices=["int4", "int8", "bfloat16"])
    parser.add_argument("--head", default="int4", choices=["int4", "int8", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--kv", default="auto", help="auto (bf16), fp8, int8 or int4")
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length")
    parser.add_argument("--steps", type=int, default=40, help="tokens that are decoded")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    text = replace(load_model_config(asset("configs/2.0")).text, num_hidden_layers=options.layers)
    with torch.inference_mode():
        network = build(text, options.weights, options.head)
        result: dict[str, Any] = {"benchmark": "quant_model", "weights": options.weights, "head": options.head}
        result |= {"layers": options.layers, "threads": options.threads, "machine": machine()}
        rate = bandwidth()
        result |= {"read_gb_per_second": round(rate / 1e9, 1), "lengths": {}}
        for length in options.lengths:
            result["lengths"][length] = measure(network, text, length, rate, options)
    print(json.dumps({**result, "peak_gib": round(peak_gib(), 2)}))


if __name__ == "__main__":
    main()
