"""Memory of the reference sparse attention: one layer of 2.0 geometry, one prefill chunk, a long context.

32 query heads, 4 key/value heads, 128 dimensions, 16 indexer heads of 64, 2,048 keys kept; the chunk is as long as the
engine's. Each context length runs in its own processes, with random tensors, which is the worst case: neighbouring
queries of a real model share most of their keys. Two measures, both beyond inputs, cache and output:

* `peak_mib`: growth of the process's resident memory (the kernel's VmHWM), libraries' scratch included;
* `tensors_mib`: the same for torch's allocator alone, from its profiler; `seconds` is the time of this run.

Prints JSON. Run:
    python benchmarks/dsa_memory.py [--queries 1024] [--contexts 32768 65536 131072] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.config import SparseConfig, TextConfig
from keye.engine.step import ALONE_TOKENS
from keye.models.attention import CachedStep, IndexerOutput, Span

TARGET_MIB = 256
MIB = 2**20
SPARSE = SparseConfig(indexer_num_heads=16, indexer_head_dim=64, topk=2048)
GEOMETRY = TextConfig(
    vocab_size=1, hidden_size=2048, intermediate_size=1, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, rope_theta=1e7, mrope_section=(16, 24, 24), max_position_embeddings=262144,
    sparse=SPARSE,
)  # fmt: skip


def prepare(context: int, queries: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A chunk of `queries` tokens that ends a context of `context`, its cache filled: the returned call attends."""
    torch.manual_seed(0)
    heads, groups, dim = GEOMETRY.num_attention_heads, GEOMETRY.num_key_value_heads, GEOMETRY.head_dim
    cache = KVCache(1)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_()

    def keys(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw(tokens, groups, dim), draw(tokens, groups, dim), draw(tokens, SPARSE.indexer_head_dim)

    k, v, indexer_k = keys(context)
    cache.append(0, {"k": k, "v": v, "indexer_k": indexer_k.unsqueeze(1)})
    cache.truncate(context - queries)  # the chunk then finds room and the cache does not grow while measured
    k, v, indexer_k = keys(queries)
    q = draw(queries, heads, dim)
    gate = torch.empty(queries, SPARSE.indexer_num_heads).normal_()
    index = IndexerOutput(draw(queries, SPARSE.indexer_num_heads, SPARSE.indexer_head_dim), indexer_k, gate)
    step = CachedStep([Span(0, queries, cache)], GEOMETRY)

    def attend() -> Tensor:
        cache.truncate(context - queries)
        with torch.no_grad():
            return step.attend(0, q, k, v, index)

    return attend


def resident_growth(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes by which the resident set grew at its highest point during `run`."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that the C library kept after a free would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    before = _status_bytes("VmRSS")
    out = run()
    return _status_bytes("VmHWM") - before, out


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def allocator_growth(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that torch's CPU allocator held at most during `run`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    usage = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        usage += event.nbytes()
        highest = max(highest, usage)
    return highest, out


def measure(context: int, queries: int, dtype: torch.dtype, measure_of: str) -> dict[str, Any]:
    """One measurement in this process."""
    prepare(4096, 8, dtype)()  # libraries allocate their own buffers and read their kernels once
    attend = prepare(context, queries, dtype)
    begin = time.perf_counter()
    grew, out = (resident_growth if measure_of == "resident" else allocator_growth)(attend)
    return {"bytes": grew - out.numel() * out.element_size(), "seconds": round(time.perf_counter() - begin, 2)}


def in_own_process(arguments: argparse.Namespace, context: int, measure_of: str) -> dict[str, Any]:
    """`measure` in a fresh process, so that nothing of an earlier measurement is left.

    For resident memory, glibc's threshold for giving large blocks back is fixed at its first value: it otherwise grows
    with use, and fragments of the heap would be measured.
    """
    command = [
        sys.executable, __file__, "--child", measure_of, "--contexts", str(context),
        "--queries", str(arguments.queries), "--dtype", arguments.dtype, "--threads", str(arguments.threads),
    ]  # fmt: skip
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)} if measure_of == "resident" else {}
    child = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **fixed})
    result: dict[str, Any] = json.loads(child.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=ALONE_TOKENS, help="tokens of the chunk")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 65536, 131072], help="tokens with the chunk")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of cache and activations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=["resident", "allocator"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not all(0 < arguments.queries <= context for context in arguments.contexts):
        parser.error("--queries must lie between 1 and every context")
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        dtype = getattr(torch, arguments.dtype)
        print(json.dumps(measure(arguments.contexts[0], arguments.queries, dtype, arguments.child)))
        return
    rows = []
    for context in arguments.contexts:
        resident = in_own_process(arguments, context, "resident")
        allocator = in_own_process(arguments, context, "allocator")
        rows.append({"context": context, "peak_mib": round(resident["bytes"] / MIB, 1),
                     "tensors_mib": round(allocator["bytes"] / MIB, 1), "seconds": allocator["seconds"]})  # fmt: skip
    result = {
        "benchmark": "dsa_memory",
        "queries": arguments.queries, "dtype": arguments.dtype, "threads": arguments.threads,
        "target_mib": TARGET_MIB, "reached": all(row["peak_mib"] <= TARGET_MIB for row in rows),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}", "contexts": rows,
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
