"""What an int8 or int4 head is worth behind int4 layers: speed at the size of Keye-VL-2.0, and the shift of
log-probabilities.

    python -m benchmarks.quant_head [--context 512] [--rounds 5]

Speed: decode of one token through layers of 2.0's width, and its whole head in each format, by turns in one process;
CPU time of one thread, medians. `tokens_per_second` is that of 48 such layers and the head. Shift: keye-nano with int4
layers and each head on questions and answers about FrameForge clips; `shift` is the mean difference of the
log-probabilities of the tokens that follow from those with a bfloat16 head, `divergence` the mean Kullback-Leibler
divergence, in nats. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch

import keye
from benchmarks.quant_model import Network, build, decode
from benchmarks.quant_nano import probabilities, test_prompts
from benchmarks.scale import DTYPE, fill, machine
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore
from keye.config import TextConfig, load_model_config
from keye.hub import asset, resolve
from keye.models.attention import cache_rows
from keye.models.load import load_model
from keye.quant.policy import make_policy, parse_part

HEADS = ("bfloat16", "int8", "int4")
LAYERS = 2


def speed(text: TextConfig, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a layer and of each head, and what they make of a model of 48 layers."""
    text = replace(text, num_hidden_layers=LAYERS)
    networks: dict[str, Network] = {}
    for head in HEADS:
        networks[head] = build(text if not networks else replace(text, num_hidden_layers=0), "int4", head)
        networks[head].model = networks[HEADS[0]].model
    store = KVStore(KVLayout.of(cache_rows(text), DTYPE, "auto"))
    layers: list[float] = []
    heads: dict[str, list[float]] = {head: [] for head in HEADS}
    for _ in range(rounds):
        for head, network in networks.items():
            cache = KVCache(LAYERS, store)
            fill(cache, context)
            times = decode(network, text, cache, context, 12)[2:]
            cache.free()
            layers += [first for first, _ in times]
            heads[head] += [second for _, second in times]
    layer = median(layers) / LAYERS
    total = {head: 48 * layer + median(times) for head, times in heads.items()}
    return {
        head: {
            "layer_ms": round(layer * 1e3, 3), "head_ms": round(median(heads[head]) * 1e3, 2),
            "tokens_per_second": round(1 / total[head], 2), "gain": round(total["bfloat16"] / total[head] - 1, 3),
        }
        for head in HEADS
    }  # fmt: skip


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def shifts() -> dict[str, dict[str, float]]:
    """How far each head moves the log-probabilities of right answers of keye-nano with int4 layers."""
    prompts, folder = list(test_prompts(keye.load("nano"))), resolve("nano")
    results: dict[str, dict[str, float]] = {}
    exact: list[torch.Tensor] = []
    for head in HEADS:
        policy = make_policy("int4", overrides=dict([parse_part(f"head={head.replace('bfloat16', 'keep')}")]))
        model, _ = load_model(folder, load_model_config(folder), dtype=torch.bfloat16, quant=policy)
        own = [probabilities(model, *prompt) for prompt in prompts]
        exact = exact or own
        moved, divergence = [], []
        for (prompt, before), ours, theirs in zip(prompts, own, exact, strict=True):
            answer = prompt.token_ids[before : before + len(ours)].unsqueeze(1)
            moved.append((ours.gather(1, answer) - theirs.gather(1, answer)).abs().flatten())
            divergence.append((theirs.exp() * (theirs - ours)).sum(-1))
        results[head] = {
            "shift": round(float(torch.cat(moved).mean()), 5),
            "divergence": round(float(torch.cat(divergence).mean()), 6),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = load_model_config(asset("configs/2.0")).text
    with torch.inference_mode():
        figures = speed(text, options.context, options.rounds)
    result: dict[str, Any] = {"benchmark": "quant_head", "context": options.context, "machine": machine()}
    moved = shifts()
    print(json.dumps({**result, "heads": {head: {**figures[head], **moved[head]} for head in HEADS}}))


if __name__ == "__main__":
    main()
