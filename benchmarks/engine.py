"""The engine with many requests: decode rate of a batch, latency of those who write while a long prompt is read.

    python -m benchmarks.engine batch --json        # 16 requests at once against 16 in a row, prefill excluded
    python -m benchmarks.engine latency --json      # time between tokens with and without a long prefill beside them
    python -m benchmarks.engine deterministic --json  # what bit-equal tokens cost

keye-nano, greedy, `ignore_eos`. Prints JSON; the best of several rounds, with the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import keye
from keye import Frames, Keye
from keye.chat.messages import Medium, Message
from keye.engine.request import Closed, Delta, Event, Generating, GenerationRequest

CLIENTS, TOKENS = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batch", "latency", "deterministic"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=800, help="frames of the long prompt")
    parser.add_argument("--json", action="store_true", help="(the output is always JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = keye.load("nano")
    measure = {"batch": batch, "latency": latency, "deterministic": deterministic}[options.what]
    print(json.dumps({"what": options.what, "threads": options.threads, **measure(model, options)}))


def clip(seed: int, frames: int = 16) -> Frames:
    """Noise of keye-nano's own size."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 112, 112, 3), dtype=np.uint8)
    return Frames(pixels, tuple(i / 2 for i in range(frames)))


def question(model: Keye, seed: int, **options: Any) -> GenerationRequest:
    words = Message("user", (Medium("video", clip(seed)), "when is the red circle visible?"))
    return model.request([words], max_tokens=TOKENS, ignore_eos=True, **options)


def decode_seconds(model: Keye, requests: Sequence[GenerationRequest]) -> float:
    """Seconds of writing: from the step after which all prompts are computed to the end."""
    core, events = model.core, list[Event]()
    tasks = [core.add(request, events.append) for request in requests]
    while any(not isinstance(task.state, Generating | Closed) for task in tasks):
        if not core.step():
            core.wait_for_work()
    done = sum(len(choice.reply) for task in tasks for choice in task.choices)
    begin = time.perf_counter()
    while not core.is_idle():
        core.step()
    return (time.perf_counter() - begin) / (len(requests) * TOKENS - done)


def batch(model: Keye, options: argparse.Namespace, **request: Any) -> dict[str, Any]:
    """Tokens a second of requests decoded together against the same one after another."""
    requests = [question(model, seed, **request) for seed in range(CLIENTS)]
    for request in requests:  # their prompts stay in the prefix cache, so that all begin to write at once
        decode_seconds(model, [request])
    rounds = []
    for _ in range(options.rounds):
        row = sum(decode_seconds(model, [request]) for request in requests) / CLIENTS
        rounds.append((1 / row, 1 / decode_seconds(model, requests)))
    ratios = sorted(together / row for row, together in rounds)
    return {
        "clients": CLIENTS, "tokens_each": TOKENS,
        "row_tokens_per_second": round(max(row for row, _ in rounds), 1),
        "batch_tokens_per_second": round(max(together for _, together in rounds), 1),
        "ratio": round(ratios[len(ratios) // 2], 2), "ratios": [round(ratio, 2) for ratio in ratios],
    }  # fmt: skip


def deterministic(model: Keye, options: argparse.Namespace) -> dict[str, Any]:
    """The same two rates with `deterministic=True`."""
    free, fixed = batch(model, options), batch(model, options, deterministic=True)
    cost = free["batch_tokens_per_second"] / fixed["batch_tokens_per_second"]
    alone = free["row_tokens_per_second"] / fixed["row_tokens_per_second"]
    return {"free": free, "deterministic": fixed, "slower_in_a_batch": round(cost, 2), "slower_alone": round(alone, 2)}


def gaps(model: Keye, long: GenerationRequest | None) -> list[float]:
    """Seconds between tokens of four requests that write; with `long`, only while its prompt is computed."""
    core, times = model.core, dict[int, list[float]]()
    tasks = []
    for seed in range(4):
        stamps = times.setdefault(seed, [])

        def on_event(event: object, stamps: list[float] = stamps) -> None:
            if isinstance(event, Delta) and event.tokens:
                stamps.append(time.perf_counter())

        words = Message("user", (Medium("video", clip(seed)), "when is the red circle visible?"))
        request = model.request([words], max_tokens=600, ignore_eos=True)
        tasks.append(core.add(request, on_event))
    while any(not isinstance(task.state, Generating) for task in tasks):
        if not core.step():
            core.wait_for_work()
    for _ in range(30):  # the pace of writing becomes known
        core.step()
    begin = time.perf_counter()
    if long is None:
        while min(map(len, times.values())) < 300:
            core.step()
        end = time.perf_counter()
    else:
        events = list[Event]()
        task = core.add(long, events.append)
        while not isinstance(task.state, Generating | Closed):
            core.step()
        end = time.perf_counter()
        core.abort(task)
    for task in tasks:
        core.abort(task)
    model.clear_caches()
    return [b - a for row in times.values() for a, b in pairwise(row) if begin <= a and b <= end]


def latency(model: Keye, options: argparse.Namespace) -> dict[str, Any]:
    """The 95th percentile of the time between tokens, while a long prompt is read and without."""
    words = Message("user", (Medium("video", clip(99, options.frames)), "what happens?"))
    long = model.request([words], max_tokens=1)
    rounds = []
    for _ in range(options.rounds):
        alone, companion = gaps(model, None), gaps(model, long)
        rounds.append((p95(alone), p95(companion), max(companion), len(companion) // 4))
    ratios = sorted(companion / alone for alone, companion, _, _ in rounds)
    tokens = model.runtime.prompts.lay_out(long.prompt).token_ids.shape[0]  # type: ignore[arg-type]
    return {
        "prompt_tokens": tokens, "steps_beside": rounds[0][3],
        "p95_alone_ms": round(1000 * min(row[0] for row in rounds), 2),
        "p95_beside_ms": round(1000 * min(row[1] for row in rounds), 2),
        "longest_beside_ms": round(1000 * min(row[2] for row in rounds), 2),
        "ratio": round(ratios[len(ratios) // 2], 2), "ratios": [round(ratio, 2) for ratio in ratios],
    }  # fmt: skip


def p95(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95))


if __name__ == "__main__":
    main()
