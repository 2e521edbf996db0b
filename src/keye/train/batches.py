"""Makes the batches of a training run ahead of it: in a process of its own, or in the workers of a decode service."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from keye.cluster.decode_queue import Priority
from keye.cluster.decode_work import CallWork
from keye.cluster.service import open_service
from keye.process import end_with_parent

#: Batches that are made ahead by one process, and by a service beyond one for each of its workers.
PREFETCH = 3

#: (stage, model folder, seed) -> batch.
MakeBatch = Callable[[Any, Path, int], Any]


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchProcess:
    """One process of this machine."""

    ahead = PREFETCH

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)

    def submit(self, make_batch: MakeBatch, stage: Any, folder: Path, seed: int) -> Future[Any]:
        """Calls `make_batch` in the process."""
        return self._pool.submit(make_batch, stage, folder, seed)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


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
