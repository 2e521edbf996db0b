"""Workers that are no processes, for tests of the decode service: they do what a test tells them, when it says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keye.cluster.pool import WorkerDied
from keye.cluster.pool_worker import ABSENT, DONE, Answer


@dataclass(frozen=True)
class Item:
    """Work of `size` bytes."""

    name: str
    size: int = 1
    node: str | None = None
    on: tuple[str, ...] = ("a", "b")
    is_stored: bool = False

    @property
    def key(self) -> str:
        return self.name

    def begin(self) -> Any:
        raise AssertionError("a fake worker begins nothing")

    def result(self, rest: Any, buffer: Any) -> Any:
        return rest

    def carried(self) -> Item | None:
        return Item(self.name, self.size, on=("a", "b", "c")) if self.is_stored else None


class FakeWorker:
    """Asks the pool what to do with each piece of work."""

    def __init__(self, pool: FakePool, node: str) -> None:
        self.node, self._pool, self._item = node, pool, Item("nothing")
        self.stopped = threading.Event()

    def hello(self) -> Answer:
        return DONE, self.node

    def check(self) -> None:
        """It is always there."""

    def begin(self, work: Any) -> Answer:
        self._item = work
        if self.node not in work.on:
            return ABSENT, None
        self._check(self._pool.at_begin)
        return DONE, (work.size, 0)

    def finish(self, buffer_bytes: int) -> tuple[Answer, Any]:
        self._check(self._pool.at_finish)
        self._pool.done.append((self._item.name, self.node))
        return (DONE, self._item.name), np.empty(0, np.uint8)

    def drop(self) -> None:
        self._pool.dropped.append(self._item.name)

    def stop(self) -> None:
        self.stopped.set()

    def _check(self, hook: Callable[[FakeWorker, Item], None]) -> None:
        hook(self, self._item)
        if self.stopped.is_set():
            raise WorkerDied


def _nothing(worker: FakeWorker, item: Item) -> None:
    """Every piece of work goes well."""


@dataclass
class FakePool:
    """A worker on each of `nodes`. Hooks run in the worker's thread and may block, or raise `WorkerDied`."""

    nodes: tuple[str, ...] = ("a",)
    at_begin: Callable[[FakeWorker, Item], None] = _nothing
    at_finish: Callable[[FakeWorker, Item], None] = _nothing
    lost: set[str] = field(default_factory=set)
    done: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def start(self) -> list[FakeWorker]:
        return [FakeWorker(self, node) for node in self.nodes]

    def replace(self, worker: Any) -> FakeWorker | None:
        return None if worker.node in self.lost else FakeWorker(self, worker.node)

    def close(self) -> None:
        """Nothing is held."""
