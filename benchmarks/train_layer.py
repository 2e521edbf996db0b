"""Attention of one layer in training, the indexer's loss included: seconds and memory of both passes.

Two geometries. `nano`: keye-nano's step, 4 videos of 312 tokens with 16 questions of 20 tokens each. `2.0`: one
sequence of `--length` tokens, 32 query heads, 4 key/value heads, 128 dimensions, 16 indexer heads of 64, 2,048 keys
kept; indexer queries and keys are AR(1) walks, so that neighbours share keys as those of a model do.

* `select_s`, `forward_s` (selection not included), `backward_s`: CPU seconds over all threads, the least of `--repeats`
  runs;
* `memory_mib`: growth of the process's resident memory (the kernel's VmHWM) during one forward and backward pass in a
  fresh process, and `beyond_mib`: the same without the outputs, their gradients and the selected keys;
* `errors`: with `--check`, the largest difference of each gradient in float32 from that of a naive version in float64,
  relative to the largest number of that gradient or 1; at most 2,048 tokens.

Prints JSON. Run:
    python -m benchmarks.train_layer [--geometry nano] [--mode sparse] [--kernels auto] [--threads 1] [--check]
    python -m benchmarks.train_layer --geometry 2.0 --length 32768
"""

from __future__ import annotations

import argparse
import itertools
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import subprocess
import sys
import time
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from benchmarks.attention import KEY_RHO, QUERY_RHO
from benchmarks.dsa_memory import MIB, resident_growth
from keye.ops import registry
from keye.ops.tree import Segment, attend_dense, attend_sparse, attend_warmup, select_keys
from keye.ops.tree_tiles import Operands

Mode = Literal["dense", "warmup", "sparse"]
#: Heads, groups, dim, indexer heads, indexer dim, keys kept.
GEOMETRIES = {"nano": (4, 2, 64, 8, 32, 64), "2.0": (32, 4, 128, 16, 64, 2048)}
TRUNK, BRANCHES, BRANCH, TREES = 312, 16, 20, 4


def make_segments(geometry: str, length: int) -> tuple[Segment, ...]:
    if geometry == "2.0":
        return (Segment(0, length, ((0, length),), 0),)
    segments = []
    for tree in range(TREES):
        start = tree * (TRUNK + BRANCHES * BRANCH)
        video = (start, start + TRUNK)
        segments.append(Segment(*video, (video,), 0))
        for at in range(video[1], video[1] + BRANCHES * BRANCH, BRANCH):
            segments.append(Segment(at, at + BRANCH, (video, (at, at + BRANCH)), TRUNK))
    return tuple(segments)


def walk(length: int, heads: int, dim: int, rho: float, generator: torch.Generator) -> Tensor:
    """An AR(1) walk of unit variance [length, heads, dim]."""
    x = torch.randn(length, heads, dim, generator=generator)
    for t in range(1, length):
        x[t] = rho * x[t - 1] + (1 - rho * rho) ** 0.5 * x[t]
    return x


def make_operands(geometry: str, length: int, dtype: torch.dtype) -> Operands:
    H, G, D, J, I, _ = GEOMETRIES[geometry]
    generator = torch.Generator().manual_seed(0)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    q, k, v = (torch.randn(length, heads, D, generator=generator) for heads in (H, G, G))
    indexer_q, indexer_k = walk(length, J, I, QUERY_RHO, generator), walk(length, 1, I, KEY_RHO, generator)[:, 0]
    gate = (walk(length, J, 1, QUERY_RHO, generator)[..., 0] * I**-0.5).requires_grad_()
    return Operands(*map(leaf, (q, k, v, indexer_q, indexer_k)), gate)


def attend(operands: Operands, segments: tuple[Segment, ...], mode: Mode, topk: int) -> tuple[Tensor, Tensor]:
    """Output and the indexer's loss."""
    q, k, v, indexer_q, indexer_k, gate = operands
    if mode == "dense":
        return attend_dense(q, k, v, segments), torch.zeros(())
    assert indexer_q is not None and indexer_k is not None and gate is not None
    if mode == "warmup":
        out, figures = attend_warmup(q, k, v, indexer_q, indexer_k, gate, segments)
    else:
        out, figures = attend_sparse(q, k, v, indexer_q, indexer_k, gate, segments, topk, teach=True)
    return out, figures.kl_sum


def measure_seconds(
    operands: Operands, segments: tuple[Segment, ...], mode: Mode, topk: int, repeats: int
) -> dict[str, float]:
    upstream, best = torch.randn_like(operands.q), {}
    for _ in range(repeats):
        times = [time.process_time()]
        if mode == "sparse":
            indexer_q, indexer_k, gate = operands[3:]
            assert indexer_q is not None and indexer_k is not None and gate is not None
            select_keys(operands.q, operands.k, indexer_q, indexer_k, gate, segments, topk)
        times.append(time.process_time())
        out, kl = attend(operands, segments, mode, topk)
        times.append(time.process_time())
        torch.autograd.backward(
            [out, kl] if kl.requires_grad else [out], [upstream, torch.ones(())][: 1 + kl.requires_grad]
        )
        times.append(time.process_time())
        select, forward, backward = (b - a for a, b in itertools.pairwise(times))
        for name, value in (("select_s", select), ("forward_s", forward), ("backward_s", backward)):
            best[name] = min(best.get(name, value), value)
    best["forward_s"] -= best["select_s"]
    return {name: round(value, 5) for name, value in best.items()}


def measure_memory(operands: Operands, segments: tuple[Segment, ...], mode: Mode, topk: int) -> dict[str, float]:
    upstream = torch.randn_like(operands.q)

    def run() -> Tensor:
        out, kl = attend(operands, segments, mode, topk)
        torch.autograd.backward(
            [out, kl] if kl.requires_grad else [out], [upstream, torch.ones(())][: 1 + kl.requires_grad]
        )
        return out

    growth, out = resident_growth(run)
    results = [out, *(x.grad for x in operands if x is not None and x.grad is not None)]
    own = sum(x.numel() * x.element_size() for x in results)
    if mode == "sparse":
        own += 4 * len(operands.q) * min(topk, max(segment.length for segment in segments))
    return {"memory_mib": round(growth / MIB, 1), "beyond_mib": round((growth - own) / MIB, 1)}


def naive(operands: Operands, sets: Tensor | None, segments: tuple[Segment, ...]) -> tuple[Tensor, Tensor]:
    """The same from [heads, T, S] tensors, in float64."""
    q, k, v, indexer_q, indexer_k, gate = (x.double() for x in operands if x is not None)
    (T, H, D), (S, G, _) = q.shape, k.shape
    mask = torch.zeros(T, S + 1, dtype=torch.bool)
    if sets is not None:
        mask.scatter_(1, sets.long() % (S + 1), True)
    else:
        for segment in segments:
            rows = segment.rows(0, segment.length, q.device)
            for query in range(segment.start, segment.stop):
                mask[query, rows[: segment.first + query - segment.start + 1]] = True
    mask = mask[:, :S]
    wide_k, wide_v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    probs = (torch.einsum("thd,shd->hts", q, wide_k) * D**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    scores = torch.einsum("tjs,tj->ts", torch.einsum("tji,si->tjs", indexer_q, indexer_k).relu(), gate)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0)
    teachers = probs.detach().unflatten(0, (G, -1)).mean(1)
    kl = (torch.special.xlogy(teachers, teachers) - teachers * log_q).sum()
    return torch.einsum("hts,shd->thd", probs, wide_v), kl


def measure_errors(geometry: str, length: int, mode: Mode, topk: int) -> dict[str, float]:
    if geometry == "2.0":
        length, topk = min(length, 2048), min(topk, 256)
    segments = make_segments(geometry, length)
    operands = make_operands(geometry, segments[-1].stop, torch.float32)
    indexer_q, indexer_k, gate = operands[3:]
    assert indexer_q is not None and indexer_k is not None and gate is not None
    sets = select_keys(operands.q, operands.k, indexer_q, indexer_k, gate, segments, topk) if mode == "sparse" else None
    upstream, gradients = torch.randn(operands.q.shape, generator=torch.Generator().manual_seed(1)), []
    for out, kl in (attend(operands, segments, mode, topk), naive(operands, sets, segments)):
        loss = (out * upstream.to(out.dtype)).sum() + (0 if mode == "dense" else kl)
        gradients.append(torch.autograd.grad(loss, operands, allow_unused=True, materialize_grads=True))
    return {
        name: float((ours.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1))
        for name, ours, wanted in zip(Operands._fields, *gradients, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="nano")
    parser.add_argument("--length", type=int, default=4096, help="tokens of geometry 2.0")
    parser.add_argument("--mode", choices=get_args(Mode), default="sparse")
    parser.add_argument("--kernels", choices=["auto", "reference"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare gradients with a naive version")
    parser.add_argument("--memory", action="store_true", help="measure memory only, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    geometry, mode, topk = arguments.geometry, arguments.mode, GEOMETRIES[arguments.geometry][-1]
    segments = make_segments(geometry, arguments.length)
    result: dict[str, Any] = vars(arguments) | {"tokens": segments[-1].stop}
    with registry.backends.using(arguments.kernels):
        operands = make_operands(geometry, segments[-1].stop, torch.bfloat16)
        if arguments.memory:
            measure_seconds(make_operands(geometry, 512, torch.bfloat16), make_segments("2.0", 512), mode, 64, 1)
            print(json.dumps(measure_memory(operands, segments, mode, topk)))
            return
        result |= measure_seconds(operands, segments, mode, topk, arguments.repeats)
        if arguments.check:
            result["errors"] = measure_errors(geometry, arguments.length, mode, topk)
    command = [sys.executable, "-m", "benchmarks.train_layer", *sys.argv[1:], "--memory"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(json.dumps(result | json.loads(done.stdout.splitlines()[-1]), indent=2))


if __name__ == "__main__":
    main()
