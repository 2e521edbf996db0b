"""Figures of a run beside its losses: throughput, share of the hardware's rate, memory, time spent waiting for data."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch

from keye.models.keye import KeyeModel
from keye.models.moe import MoE
from keye.train.config import TrainConfig
from keye.train.parallel import Group
from keye.train.plan import measure_rate

#: Seconds after which the rate of the device is measured, where it is not configured: not in runs of seconds.
MEASURED_AFTER: Final = 60.0


class Meter:
    """Counts what steps learn from; `take` returns rates since its last call and starts again. Rates are of all
    processes together, memory is that of the process that uses most."""

    def __init__(self, model: KeyeModel, group: Group, run: TrainConfig, mates: int = 1) -> None:
        """`mates` processes have the same packs."""
        self.group, self.model, self.device = group, model, model.device
        self.mates, self.peak, self.dtype = mates, run.peak_flops, run.dtype
        self._start = time.monotonic()
        self._counts: dict[str, float] = defaultdict(float)
        self._waited, self._begin = 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time of the block is spent waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def count(self, figures: Mapping[str, float]) -> None:
        """Adds the figures of a step's batch: `tokens`, `frames` and `patches` are amounts."""
        for name in ("tokens", "frames", "patches"):
            self._counts[name] += figures.get(name, 0.0) / self.mates

    def take(self, steps: int) -> dict[str, float]:
        """The figures of the `steps` steps since the last call."""
        seconds = max(1e-9, time.monotonic() - self._begin)
        names = ("tokens", "frames", "patches")
        sums = dict(zip(names, self.group.total(*(self._counts[name] for name in names)), strict=True))
        figures = {"steps_per_second": steps / seconds, "waiting": self._waited / seconds,
                   "memory_bytes": max(self.group.collect(peak_memory(self.device)))}  # fmt: skip
        figures |= {f"{name}_per_second": sums[name] / seconds for name in ("tokens", "frames") if sums[name]}
        if self.peak is None and self.group.rank == 0 and time.monotonic() - self._start > MEASURED_AFTER:
            self.peak = measure_rate(str(self.device), self.dtype)
        if sums["tokens"] and self.peak is not None:
            work = step_flops(self.model, sums["tokens"], sums["patches"])
            figures["mfu"] = work / seconds / (self.peak * self.group.size)
        self._counts.clear()
        self._waited, self._begin = 0.0, time.monotonic()
        return figures


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used: of a GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def step_flops(model: KeyeModel, tokens: float, patches: float) -> float:
    """Floating-point operations of the matrix products of a forward and backward pass: 2 for each weight that a token
    (or patch) meets in the forward pass, 2 where its input needs a gradient, 2 where it is trained. Attention between
    tokens is not counted, nor what activation checkpointing does twice."""
    trains_vision = any(p.requires_grad for name, p in model.named_parameters() if name.startswith("visual."))
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            share = module.gate.top_k / module.gate.weight.shape[0]
        elif name.endswith(".experts") or ".experts." in name:
            continue
        else:
            share = 1.0
        parameters = module.experts.parameters() if isinstance(module, MoE) else module.parameters(recurse=False)
        for p in parameters:
            if p.ndim < 2 or name.endswith("embed_tokens"):
                continue
            vision = name.startswith("visual.")
            rows = patches if vision else tokens
            passes = 1 + p.requires_grad + (trains_vision if vision else True)
            total += 2.0 * rows * p.numel() * share * passes
    return total


def round_figure(value: float) -> float | None:
    """A figure of the log with six significant digits (whole numbers as they are); None where it is not finite, which
    JSON cannot write."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
