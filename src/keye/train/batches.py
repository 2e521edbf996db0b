"""Makes the batches of a training run ahead of it: in a process of its own, or in the workers of a decode service."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from keye.cluster.decode_queue import Priority
from keye.cluster.decode_work import CallWork
from keye.cluster.service import open_service
from keye.errors import KeyeError
from keye.process import leave_terminal

#: Batches that are made ahead by one process, and by a service beyond one for each of its workers.
PREFETCH = 3

#: (stage, model folder, seed) -> batch.
MakeBatch = Callable[[Any, Path, int], Any]


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class StepBatch:
    """What one process learns from in one step.

    `micro`: its micro-batches, dataclasses of numpy arrays, passed through the model one after another. Every process
    has as many, one without learnt tokens where there is nothing for it. `count`: the weight of all learnt tokens of
    the step, those of the other processes included; the losses' denominator. `state`: what `open_batches` resumes from
    after this step, as JSON. `figures`: for the log. `share`: how much of the stage's data lies before this step
    where the data decide its length, else 0.
    """

    micro: Sequence[Any]
    count: float
    state: dict[str, Any]
    figures: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.0


class BatchSource(Protocol):
    """The batches of one process in one stage, in order."""

    def next(self) -> StepBatch | None:
        """The batch of the next step; None where the data are at their end, which is the same step everywhere."""

    def close(self) -> None:
        """Ends whatever helps to make batches."""


class OpenBatches(Protocol):
    """Opens the batches of a stage."""

    def __call__(
        self, stage: Any, folder: Path, *, seed: int, rank: int, size: int, state: dict[str, Any] | None,
        decode: str | None = None,
    ) -> BatchSource:  # fmt: skip
        """The batches of process `rank` of `size`, after the step that `state` is of. `folder` has the model's
        tokenizer and processor; `decode` is the address of a decode service, None where media are decoded here."""


class BatchProcess:
    """A process that makes the batches of one stage after another, each ahead of the step that learns from it."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=leave_terminal)
        self._waiting: deque[Future[StepBatch | None]] = deque()
        self._make: Callable[[], StepBatch | None] | None = None

    def open(self, key: str, open_source: Callable[[], BatchSource]) -> None:
        """Begins with the batches of `open_source()`, which is called in the process; `key` tells sources apart."""
        self._drop()
        self._make = partial(_next, key, open_source)

    def next(self) -> StepBatch | None:
        """The batch of the next step. Errors of making it are raised here."""
        assert self._make is not None, "no source is open"
        while len(self._waiting) < PREFETCH:
            self._waiting.append(self._pool.submit(self._make))
        try:
            return self._waiting.popleft().result()
        except BrokenProcessPool:
            text = "the process that makes batches was killed, as it is where memory is short; the run can be resumed"
            raise KeyeError(text) from None

    def close(self) -> None:
        self._drop()
        if self._make is not None:
            with suppress(BrokenProcessPool):
                self._pool.submit(_close)
        self._pool.shutdown(wait=False)

    def _drop(self) -> None:
        while self._waiting:
            self._waiting.pop().cancel()


#: In the process: the source that is open and its key.
_open: list[tuple[str, BatchSource]] = []


def _next(key: str, open_source: Callable[[], BatchSource]) -> StepBatch | None:
    if not _open or _open[0][0] != key:
        _close()
        _open.append((key, open_source()))
    return _open[0][1].next()


def _close() -> None:
    while _open:
        _open.pop()[1].close()


class BatchService:
    """The decode service at an address. Batches are the same: they depend on their seed alone."""

    def __init__(self, address: str) -> None:
        self._service = open_service(address)
        self.ahead = PREFETCH + int(self._service.gauges()["workers"])

    def submit(self, make_batch: MakeBatch, stage: Any, folder: Path, seed: int) -> Future[Any]:
        """Calls `make_batch` in a worker, after all work that a request waits for."""
        return self._service.submit(CallWork(make_batch, (stage, folder.absolute(), seed)), Priority.TRAINING)

    def close(self) -> None:
        self._service.close()
