"""Decode workers on the nodes of a Ray cluster: an actor for each processor. Results come through Ray's object store,
which maps them, so frames of a worker on this machine are not copied again."""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np

from keye.cluster.decode_work import Work
from keye.cluster.pool import PoolWorker, WorkerDied
from keye.cluster.pool_worker import DEFECT, DONE, REJECTED, Answer, Desk
from keye.cluster.ray_cluster import connect
from keye.media.pixels.patches import Pixels

#: Seconds in which an actor must have found a free processor and started; how often its node is looked for meanwhile,
#: since Ray would wait for one that has gone.
START_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 1.0


class RayPool:
    """One worker for each whole processor that the cluster's nodes offer to Ray."""

    def __init__(self, address: str) -> None:
        self.ray, self._own = connect(address)
        self._actor = self.ray.remote(_Actor)

    def start(self) -> list[RayWorker]:
        nodes = self.nodes().items()
        return [RayWorker(self, node) for node, has in nodes for _ in range(int(has.get("CPU", 0)))]

    def replace(self, worker: PoolWorker) -> RayWorker | None:
        """On the same node; None where that is gone."""
        return RayWorker(self, worker.node) if worker.node in self.nodes() else None

    def close(self) -> None:
        if self._own:
            self.ray.shutdown()

    def actor(self, node: str) -> Any:
        """A new actor on a node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(node, soft=False)
        return self._actor.options(num_cpus=1, scheduling_strategy=place).remote()

    def nodes(self) -> dict[str, dict[str, float]]:
        """The resources of all nodes that are alive, by their ids."""
        return {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}


class RayWorker:
    """An actor. `node` is the id that Ray gave to its node."""

    def __init__(self, pool: RayPool, node: str) -> None:
        self.node, self._pool, self._ray = node, pool, pool.ray
        self._actor, self._end = pool.actor(node), time.monotonic() + START_SECONDS

    def hello(self) -> Answer:
        reference = self._actor.hello.remote()
        while not self._ray.wait([reference], timeout=LOOK_SECONDS)[0]:
            if self.node not in self._pool.nodes():
                raise WorkerDied
            if time.monotonic() > self._end:
                sentence = f"node {self.node[:12]} had no free processor for a decode worker in {START_SECONDS:g} s"
                return REJECTED, sentence
        return self._get(reference)

    def check(self) -> None:
        self._get(self._actor.hello.remote())

    def begin(self, work: Work) -> Answer:
        return self._get(self._actor.begin.remote(work))

    def finish(self, buffer_bytes: int) -> tuple[Answer, Pixels]:
        answer, buffer = self._actor.finish_here.options(num_returns=2).remote(buffer_bytes)
        reply: Answer = self._get(answer)
        return reply, self._get(buffer) if reply[0] == DONE else np.empty(0, np.uint8)

    def drop(self) -> None:
        self._actor.drop.remote()

    def stop(self) -> None:
        self._ray.kill(self._actor)

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError, ConnectionError) as error:
            raise WorkerDied(str(error)) from None
        except errors.RayTaskError as error:  # what it did could not be sent back
            return DEFECT, str(error)


class _Actor(Desk):
    """A `Desk` on a node of the cluster, whose results come with their buffer."""

    def finish_here(self, buffer_bytes: int) -> tuple[Answer, Pixels]:
        buffer, place = np.empty(buffer_bytes, np.uint8), 0

        def sink(piece: Pixels) -> None:
            nonlocal place
            buffer[place : place + piece.nbytes] = piece.reshape(-1)
            place += piece.nbytes

        return self.finish(sink), buffer
