"""Who makes the batches of a training run ahead of it: a process of its own, or the workers of a decode service."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from keye.cluster.decode_queue import Priority
from keye.cluster.decode_work import CallWork
from keye.cluster.service import open_service
from keye.process import end_with_parent
from keye.train.config import StageConfig
from keye.train.recipes.nano.batches import make_batch

#: Batches that are made ahead by one process, and by a service beyond one for each of its workers.
PREFETCH = 3


class BatchProcess:
    """One process of this machine."""

    ahead = PREFETCH

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)

    def submit(self, config: StageConfig, folder: Path, seed: int) -> Future[Any]:
        """`make_batch`, done elsewhere."""
        return self._pool.submit(make_batch, config, folder, seed)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class BatchService:
    """The decode service at an address. Batches are the same: they depend on their seed alone."""

    def __init__(self, address: str) -> None:
        self._service = open_service(address)
        self.ahead = PREFETCH + int(self._service.gauges()["workers"])

    def submit(self, config: StageConfig, folder: Path, seed: int) -> Future[Any]:
        """`make_batch`, done elsewhere, after everything that somebody waits for."""
        return self._service.submit(CallWork(make_batch, (config, folder.absolute(), seed)), Priority.TRAINING)

    def close(self) -> None:
        self._service.close()
