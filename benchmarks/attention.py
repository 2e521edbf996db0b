"""Time and scratch memory of the compiled sparse attention against dense attention of torch, one layer.

2.0 geometry: 32 query heads, 4 key/value heads, 128 dimensions, 16 indexer heads of 64, 2,048 keys kept, bfloat16.
Indexer queries and keys are synthetic AR(1) walks, so that neighbouring queries share keys as those of a model do:
`union16` is the number of keys that 16 neighbours select together. Up to 32K tokens whole prompts are run; beyond,
blocks of queries at four depths, and their cost per query, which is linear in the depth, is integrated (`method` says
which). Ratios are times of keye over times of torch from the same run:

* `prefill_ratio`: indexer, top-k and attention over causal SDPA; `prefill_ratio_own_dense`: over keye's dense kernel;
* `decode_ratio`: one token over SDPA, the faster of grouped and repeated heads; `decode_ratio_best_dense`: over a
  packed matrix product of each group's heads;
* `indexer_share_of_peak`: multiplications of the indexer, its top-k included, over torch's bfloat16 matrix product;
* `scratch_mib`: growth of resident memory during one chunk of 1,024 queries in a fresh process, beyond its output;
* `masked_crossover`: seconds of both kernels of attention over sets, 256 queries that end a context.

Prints JSON. Run:
    python -m benchmarks.attention --json --length 32768 [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.dsa_memory import MIB, resident_growth
from keye.ops.backend import Kernel, Stretch
from keye.ops.cpu import build as cpu_build
from keye.ops.cpu.backend import CpuBackend, Timers
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat, RowKind

HEADS, GROUPS, DIM, INDEXER_HEADS, INDEXER_DIM, TOPK = 32, 4, 128, 16, 64, 2048
CHUNK = 1024
#: Correlation of neighbouring indexer queries and keys.
QUERY_RHO, KEY_RHO = 0.975, 0.9
WHOLE_UP_TO = 32768
#: Longest context for which SDPA also gets keys and values repeated for every head: 2 GiB.
WIDE_UP_TO = 131072
DEPTHS = (0.25, 0.5, 0.75, 1.0)
BF16 = torch.bfloat16
KERNELS: tuple[Kernel, ...] = ("union", "masked")


class Layer:
    """One layer's store of `length` tokens, KV blocks filled at random, and queries for any part of it."""

    def __init__(self, length: int, indexer: RowKind = "bfloat16") -> None:
        self.length = length
        self.generator = torch.Generator().manual_seed(0)
        self.memory: list[Tensor] = []
        indexer_k = self.walk(length, 1, INDEXER_DIM, KEY_RHO)
        self.blocks = {"k": self.store(GROUPS, DIM), "v": self.store(GROUPS, DIM),
                       "indexer_k": self.store(1, INDEXER_DIM, indexer_k)}  # fmt: skip
        if indexer != "bfloat16":
            form, addresses = RowFormat(indexer, 1, INDEXER_DIM), self.blocks["indexer_k"].addresses
            assert addresses is not None
            self.memory.append(form.encode(self.memory[2]))
            starts = self.memory[-1].data_ptr() + torch.arange(len(addresses)) * form.block_bytes
            self.blocks["indexer_k"] = BlockRows(form, starts)

    def store(self, heads: int, dim: int, x: Tensor | None = None) -> BlockRows:
        form, blocks = RowFormat("bfloat16", heads, dim), -(-self.length // KV_BLOCK)
        memory = torch.zeros(blocks * KV_BLOCK, heads, dim, dtype=BF16)
        for start in range(0, self.length, 4096):
            part = memory[start : min(self.length, start + 4096)]
            part.copy_(torch.randn(part.shape, generator=self.generator) if x is None else x[start : start + len(part)])
        self.memory.append(memory)
        return BlockRows(form, memory.data_ptr() + torch.arange(blocks) * form.block_bytes)

    def walk(self, length: int, heads: int, dim: int, rho: float) -> Tensor:
        """An AR(1) walk of unit variance, bfloat16 [length, heads, dim]."""
        x = torch.empty(length, heads, dim, dtype=BF16)
        state = torch.randn(heads, dim, generator=self.generator)
        noise = (1 - rho * rho) ** 0.5
        for start in range(0, length, 1024):
            steps = torch.randn(min(1024, length - start), heads, dim, generator=self.generator)
            for t, step in enumerate(steps):
                state = rho * state + noise * step
                x[start + t] = state
        return x

    def queries(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, indexer queries and gates of n neighbouring tokens."""
        q = torch.randn(n, HEADS, DIM, generator=self.generator).to(BF16)
        gate = self.walk(n, INDEXER_HEADS, 1, QUERY_RHO).float().squeeze(-1) * INDEXER_DIM**-0.5
        return q, self.walk(n, INDEXER_HEADS, INDEXER_DIM, QUERY_RHO), gate

    def stretch(self, start: int, n: int, first: int) -> Stretch:
        return Stretch(start, start + n, first, rows=_never, blocks=self.blocks)

    def heads_first(self, which: int, length: int) -> Tensor:
        """Keys (0) or values (1) as [1, groups, length, dim], as SDPA takes them."""
        return self.memory[which][:length].transpose(0, 1).contiguous().unsqueeze(0)


def _never(positions: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("the compiled core reads KV blocks")


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """The shortest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def integrate(cost: Callable[[int], float], length: int) -> float:
    """Seconds of a prompt from seconds per query at some depths: a line fitted by least squares, integrated."""
    depths = torch.tensor([share * length for share in DEPTHS], dtype=torch.float64)
    costs = torch.tensor([cost(int(depth)) for depth in depths], dtype=torch.float64)
    slope, offset = torch.linalg.lstsq(torch.stack((depths, torch.ones_like(depths)), 1), costs).solution.tolist()
    return offset * length + slope * length**2 / 2


def chunks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, CHUNK):
        yield start, min(CHUNK, length - start)


def prefill(backend: CpuBackend, layer: Layer, n: int) -> tuple[dict[str, float], str]:
    """Seconds of keye's sparse and dense prefill, and of torch's."""
    L, total = layer.length, layer.length <= WHOLE_UP_TO

    def sparse(first: int, n: int, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        q, indexer_q, gate = parts
        backend.sparse(q, indexer_q, gate, [layer.stretch(0, n, first)], TOPK, torch.empty_like(q))

    def dense(first: int, n: int, q: Tensor) -> None:
        backend.dense(q, [layer.stretch(0, n, first)], torch.empty_like(q))

    def torch_block(depth: int) -> float:
        q = torch.randn(1, HEADS, n, DIM, generator=layer.generator).to(BF16)
        k, v = layer.heads_first(0, depth), layer.heads_first(1, depth)
        return seconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2) / n

    parts = layer.queries(n)
    sparse(L - n, n, parts)  # scratch is allocated once
    result = {"own_dense": integrate(lambda depth: seconds(lambda: dense(depth - n, n, parts[0]), 2) / n, L)}
    backend.timers()
    if not total:
        result["sparse"] = integrate(lambda depth: seconds(lambda: sparse(depth - n, n, parts), 2) / n, L)
        result["torch_dense"] = integrate(torch_block, L)
        depths = ", ".join(f"{share:g}" for share in DEPTHS)
        return result, f"blocks of {n} queries at depths {depths} of the length, a line fitted and integrated"
    inputs = layer.queries(L)
    result["sparse"] = 0.0
    for start, count in chunks(L):
        piece = tuple(x[start : start + count] for x in inputs)
        result["sparse"] += seconds(lambda start=start, count=count, piece=piece: sparse(start, count, piece))
    q, k, v = inputs[0].transpose(0, 1).unsqueeze(0), layer.heads_first(0, L), layer.heads_first(1, L)
    result["torch_dense"] = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return result, "whole prompts; only keye's dense kernel from blocks at four depths"


def decode(backend: CpuBackend, layer: Layer) -> dict[str, float]:
    """Seconds of one token at full depth."""
    L, (q, indexer_q, gate) = layer.length, layer.queries(1)
    k, v = layer.heads_first(0, L), layer.heads_first(1, L)
    out, stretch, heads = torch.empty_like(q), [layer.stretch(0, 1, L - 1)], q.transpose(0, 1).unsqueeze(0)
    packed, kt, vt = q.view(GROUPS, HEADS // GROUPS, DIM), k[0].transpose(1, 2).contiguous(), v[0]

    def best_dense() -> Tensor:
        logits = torch.matmul(packed, kt).float() * DIM**-0.5
        return torch.matmul(logits.softmax(-1).to(BF16), vt)

    # Grouped heads take a slow path of torch for single queries; keys repeated for every head, made beforehand, do not.
    wide = [x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v)] if L <= WIDE_UP_TO else [k, v]
    sdpa = min(
        seconds(lambda: F.scaled_dot_product_attention(heads, k, v, enable_gqa=True), 3),
        seconds(lambda: F.scaled_dot_product_attention(heads, *wide, enable_gqa=True), 5),
    )
    return {
        "sparse": seconds(lambda: backend.sparse(q, indexer_q, gate, stretch, TOPK, out), 20),
        "own_dense": seconds(lambda: backend.dense(q, stretch, out), 5),
        "torch_sdpa": sdpa,
        "torch_packed": seconds(best_dense, 10),
    }


def phases(timers: Timers) -> dict[str, float]:
    return {name: getattr(timers, name) for name, _ in Timers._fields_}


def kernels(backend: CpuBackend, layer: Layer, n: int) -> dict[str, float]:
    """Each kernel at full depth: arithmetic per second, against torch's bfloat16 matrix product."""
    x = torch.randn(2048, 2048, generator=layer.generator).to(BF16)
    peak = 2 * 2048**3 / seconds(lambda: x @ x, 5)
    q, indexer_q, gate = layer.queries(n)
    first, out = layer.length - n, torch.empty_like(q)
    stretch, backend_phases = layer.stretch(0, n, first), {}
    backend.timers()
    for name, run in (
        ("sparse", lambda: backend.sparse(q, indexer_q, gate, [stretch], TOPK, out)),
        ("dense", lambda: backend.dense(q, [stretch], out)),
    ):
        best: dict[str, float] = {}
        for _ in range(3):
            run()
            best = min(best or (now := phases(backend.timers())), now, key=lambda p: sum(p.values()))
        backend_phases[name] = best
    spent = backend_phases["sparse"]
    keys = sum(first + i + 1 for i in range(n))
    score_flops = 2 * keys * INDEXER_HEADS * INDEXER_DIM
    return {
        "peak_bf16_gflops": peak / 1e9,
        "score_gflops": score_flops / spent["score"] / 1e9,
        "indexer_share_of_peak": score_flops / (spent["score"] + spent["select"]) / peak,
        "attend_gflops": 4 * n * min(TOPK, layer.length) * HEADS * DIM / (spent["attend"] + spent["dense"]) / 1e9,
        "dense_gflops": 4 * keys * HEADS * DIM / backend_phases["dense"]["dense"] / 1e9,
        "score_us_per_query": spent["score"] / n * 1e6,
        "select_us_per_query": spent["select"] / n * 1e6,
        "attend_us_per_query": (spent["attend"] + spent["dense"]) / n * 1e6,
    }


def union16(backend: CpuBackend, layer: Layer, n: int = 64) -> float:
    """Mean size of the union of 16 neighbours' sets at the end of the context."""
    _, indexer_q, gate = layer.queries(n)
    stretch = layer.stretch(0, n, layer.length - n)
    sets = torch.cat([positions for _, positions in backend.select(indexer_q, gate, stretch, TOPK)])
    return sum(len(part.unique()) for part in sets.split(16)) / (n / 16)


def crossover(backend: CpuBackend, layer: Layer) -> list[dict[str, float]]:
    """Both kernels of attention over sets at contexts around the crossover."""
    rows = []
    for length in (2560, 3072, 4096, 6144, 8192):
        if length > layer.length:
            break
        q, indexer_q, gate = layer.queries(256)
        stretch, out = layer.stretch(0, 256, length - 256), torch.empty_like(q)
        sets = list(backend.select(indexer_q, gate, stretch, TOPK))
        row: dict[str, float] = {"length": length}
        for kernel in KERNELS:
            run = partial(backend.attend, q, sets, stretch, out, kernel=kernel)
            row[kernel] = round(seconds(run, 3), 4)
        rows.append(row)
    return rows


def scratch(library_of: CpuBackend, length: int) -> float:
    """MiB of a chunk of 1,024 queries that ends a context, in this (fresh) process."""
    layer = Layer(length)
    q, indexer_q, gate = layer.queries(CHUNK)
    stretch = layer.stretch(0, CHUNK, length - CHUNK)

    def run() -> Tensor:
        out = torch.empty_like(q)
        library_of.sparse(q, indexer_q, gate, [stretch], TOPK, out)
        return out

    library_of.timers()  # loads the library
    grew, out = resident_growth(run)
    return (grew - out.numel() * out.element_size()) / MIB


def in_own_process(arguments: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.attention", "--child", "--length", str(arguments.length),
               "--threads", str(arguments.threads)]  # fmt: skip
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="tokens of the context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block", type=int, default=256, help="queries of a block where not all are run")
    parser.add_argument("--indexer", choices=["bfloat16", "int8"], default="bfloat16",
                        help="how indexer keys are stored")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON; this is the only form there is")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.length < 4 * CHUNK:
        parser.error(f"--length must be at least {4 * CHUNK}")
    torch.set_num_threads(arguments.threads)
    status = cpu_build.ready()
    if status.library is None:
        parser.error(f"the compiled core cannot be used here: {status.note}")
    backend = CpuBackend(status.library)
    if arguments.child:
        print(scratch(backend, arguments.length))
        return
    layer = Layer(arguments.length, arguments.indexer)
    union = union16(backend, layer)
    prompt, method = prefill(backend, layer, arguments.block)
    token = decode(backend, layer)
    rates = kernels(backend, layer, arguments.block)
    result: dict[str, Any] = {
        "benchmark": "attention", "length": arguments.length, "threads": arguments.threads, "method": method,
        "variant": status.variant, "indexer": arguments.indexer,
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        "union16": round(union),
        "prefill_ratio": round(prompt["sparse"] / prompt["torch_dense"], 4),
        "prefill_ratio_own_dense": round(prompt["sparse"] / prompt["own_dense"], 4),
        "own_dense_over_torch": round(prompt["own_dense"] / prompt["torch_dense"], 4),
        "decode_ratio": round(token["sparse"] / token["torch_sdpa"], 4),
        "decode_ratio_best_dense": round(token["sparse"] / token["torch_packed"], 4),
        "scratch_mib": round(in_own_process(arguments), 1),
        "indexer_share_of_peak": round(rates.pop("indexer_share_of_peak"), 3),
        "prefill_seconds": rounded(prompt), "decode_seconds": rounded(token), "kernels": rounded(rates),
        "masked_crossover": crossover(backend, layer),
    }  # fmt: skip
    print(json.dumps(result, indent=2))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
