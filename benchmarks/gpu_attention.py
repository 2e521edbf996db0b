"""Sparse attention on a GPU against torch's dense attention: one layer of 2.0 geometry, bfloat16.

32 query heads, 4 key/value heads, 128 dimensions, 16 indexer heads of 64, 2,048 keys kept. Prefill is measured in
blocks of queries at several depths and fitted: the dense peer sees every key before its block (its flash kernel, no
mask), ours also the block itself. Decode is one query for each of 32 sequences, and of one. Indexer queries and keys
drift from token to token, so that neighbours choose alike: `union16` is the mean size of the union of 16 adjacent sets.
`scratch_mib` is the most memory that a block took beyond inputs and output.

Prints JSON, or one line without a GPU. Not run on a card yet. `--smoke` runs tiny sizes in Triton's interpreter, and
its times mean nothing. Run:
    python -m benchmarks.gpu_attention --json [--length 131072]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.ops import triton as kernels
from keye.ops.backend import Backend, Stretch
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat

HEADS, GROUPS, DIM, INDEXER_HEADS, INDEXER_DIM = 32, 4, 128, 16, 64
#: How much of a token's indexer vectors is its neighbour's.
CORRELATION = 0.97


@dataclass(frozen=True)
class Sizes:
    length: int
    block: int
    depths: int
    batch: int
    topk: int
    repeats: int


def drifting(tokens: int, heads: int, dim: int, device: str) -> Tensor:
    """Vectors of an AR(1) process over tokens, by scanning blocks: [tokens, heads, dim]."""
    state = torch.randn(heads, dim, device=device)
    noise = torch.randn(tokens, heads, dim, device=device) * (1 - CORRELATION**2) ** 0.5
    for t in range(tokens):
        state = CORRELATION * state + noise[t]
        noise[t] = state
    return noise


class Layer:
    """The stored past of one layer of `batch` sequences, and the queries of a block."""

    def __init__(self, sizes: Sizes, batch: int, queries: int, device: str, dtype: torch.dtype) -> None:
        self.sizes, self.batch, self.queries = sizes, batch, queries
        blocks = -(-sizes.length // KV_BLOCK)
        formats = [RowFormat("bfloat16", GROUPS, DIM)] * 2 + [RowFormat("bfloat16", 1, INDEXER_DIM)]
        order = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
        self.stored = []
        for rows in formats:
            x = torch.randn(batch * blocks, KV_BLOCK, rows.heads * rows.dim, device=device, dtype=torch.bfloat16)
            self.stored.append((rows, x.view(torch.uint8)))
        keys = drifting(blocks * KV_BLOCK, 1, INDEXER_DIM, device).to(torch.bfloat16)
        for sequence in range(batch):
            self.stored[2][1].view(torch.bfloat16)[order[sequence].long()] = keys.view(blocks, KV_BLOCK, INDEXER_DIM)
        self.order = order
        self.q = torch.randn(batch * queries, HEADS, DIM, device=device, dtype=dtype)
        self.indexer_q = drifting(batch * queries, INDEXER_HEADS, INDEXER_DIM, device).to(dtype)
        self.gate = torch.rand(batch * queries, INDEXER_HEADS, device=device)
        self.out = torch.empty_like(self.q)

    def stretches(self, stop: int) -> list[Stretch]:
        """The queries at the end of a context of `stop` tokens."""
        result = []
        for i in range(self.batch):
            names = zip(("k", "v", "indexer_k"), self.stored, strict=True)
            stored = {name: BlockRows(rows, None, pool, self.order[i]) for name, (rows, pool) in names}
            start, n = i * self.queries, self.queries
            result.append(Stretch(start, start + n, stop - n, rows=_unused, blocks=stored))
        return result

    def dense_inputs(self, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, heads, tokens, dim] of the peer; keys and values repeated for the heads of a group beforehand."""
        q = self.q.view(self.batch, self.queries, HEADS, DIM).transpose(1, 2).contiguous()
        blocks = self.order[:, : -(-stop // KV_BLOCK)].long()
        k, v = (
            pool.view(torch.bfloat16)[blocks].view(self.batch, -1, GROUPS, DIM)[:, :stop].transpose(1, 2)
            .repeat_interleave(HEADS // GROUPS, 1).to(q.dtype).contiguous()
            for _, pool in self.stored[:2]
        )  # fmt: skip
        return q, k, v


def _unused(positions: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("the kernels read KV blocks")


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of some runs after one that compiles."""
    run()
    times = []
    for _ in range(repeats):
        _wait()
        begin = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def union16(backend: Backend, layer: Layer, stop: int) -> float:
    """Mean size of the union of 16 adjacent sets."""
    (stretch,) = layer.stretches(stop)
    sets = torch.cat([part for _, part in backend.select(layer.indexer_q, layer.gate, stretch, layer.sizes.topk)])
    unions = [part.unique() for part in sets.split(16)]
    return sum(int((union >= 0).sum()) for union in unions) / len(unions)


def prefill(backend: Backend, sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Both at some depths, and a whole prompt from their means: time grows with depth in a straight line."""
    layer = Layer(sizes, 1, sizes.block, device, dtype)
    rows, topk = [], sizes.topk
    for i in range(sizes.depths):
        stop = max(sizes.block, sizes.length * (2 * i + 1) // (2 * sizes.depths))
        stretches, dense = layer.stretches(stop), layer.dense_inputs(stop)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        usage = torch.cuda.memory_allocated() if device == "cuda" else 0

        def sparse(stretches: list[Stretch] = stretches) -> None:
            backend.sparse(layer.q, layer.indexer_q, layer.gate, stretches, topk, layer.out)

        ours = seconds(sparse, sizes.repeats)
        scratch = torch.cuda.max_memory_allocated() - usage if device == "cuda" else None
        peer = seconds(lambda dense=dense: F.scaled_dot_product_attention(*dense), sizes.repeats)
        rows.append({"depth": stop, "dsa_ms": ours * 1e3, "sdpa_ms": peer * 1e3, "scratch_bytes": scratch})
    blocks = sizes.length / sizes.block / sizes.depths
    total = {name: blocks * sum(row[f"{name}_ms"] for row in rows) for name in ("dsa", "sdpa")}
    scratch_mib = max(row["scratch_bytes"] for row in rows) / 2**20 if device == "cuda" else None
    return {
        "prefill_dsa_ms": total["dsa"], "prefill_sdpa_ms": total["sdpa"],
        "prefill_ratio": total["dsa"] / total["sdpa"], "prefill_fitted_from": rows, "scratch_mib": scratch_mib,
        "union16": union16(backend, layer, sizes.length),
    }  # fmt: skip


def decode(backend: Backend, sizes: Sizes, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One query of each of `batch` sequences at full length."""
    layer = Layer(sizes, batch, 1, device, dtype)
    stretches = layer.stretches(sizes.length)
    ours = seconds(
        lambda: backend.sparse(layer.q, layer.indexer_q, layer.gate, stretches, sizes.topk, layer.out), sizes.repeats
    )
    blocks = layer.order.long()
    # The heads of a group are queries of one key head: the packed form reads each key once.
    q = layer.q.view(batch, GROUPS, HEADS // GROUPS, DIM)
    k, v = (
        pool.view(torch.bfloat16)[blocks].view(batch, -1, GROUPS, DIM)[:, : sizes.length].transpose(1, 2)
        .to(dtype).contiguous()
        for _, pool in layer.stored[:2]
    )  # fmt: skip
    peer = seconds(lambda: F.scaled_dot_product_attention(q, k, v), sizes.repeats)
    return {f"decode{batch}_dsa_ms": ours * 1e3, f"decode{batch}_sdpa_ms": peer * 1e3,
            f"decode{batch}_ratio": ours / peer}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072, help="tokens of the context")
    parser.add_argument("--json", action="store_true", help="kept for the form of the other benchmarks; always on")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    arguments = parser.parse_args()
    backend = kernels.make()
    if backend is None or not (arguments.smoke or torch.cuda.is_available()):
        sys.exit(f"gpu_attention needs a GPU. {kernels.status()}")
    torch.manual_seed(0)
    if arguments.smoke:
        sizes, device, dtype = Sizes(256, 16, 3, 2, 32, 1), "cpu", torch.float32
    else:
        sizes, device, dtype = Sizes(arguments.length, 2048, 4, 32, 2048, 5), "cuda", torch.bfloat16
    with torch.no_grad():
        result = {
            "benchmark": "gpu_attention", "smoke": arguments.smoke, "length": sizes.length, "topk": sizes.topk,
            "card": torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter",
            "torch": torch.__version__, "date": datetime.date.today().isoformat(), "prefill_is": "fitted from blocks",
            **prefill(backend, sizes, device, dtype),
            **decode(backend, sizes, sizes.batch, device, dtype), **decode(backend, sizes, 1, device, dtype),
        }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
