"""Engines of a batch as actors on a Ray cluster, one worker each. Paths of a manifest must mean the same files on all
its nodes, which have keye installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from keye.batch.manifest import Item
from keye.batch.workers import Answer, EngineWorker, Worker, WorkerLost, own_model
from keye.cluster.ray_cluster import connect
from keye.errors import KeyeError

#: Seconds in which a cluster must find room for an engine and the engine must load its model.
_READY_SECONDS: Final = 1800.0


def ray_workers(
    address: str, settings: Mapping[str, Any], *, count: int | None, slots: int, private: bool = False
) -> list[Worker]:
    """`count` workers on the cluster at `address` (see `ray_cluster.connect`): by default one for each GPU where
    engines run on GPUs, else one for each node."""
    ray, _ = connect(address)
    gpus = str(settings.get("device", "cpu")).startswith("cuda")
    if count is None:
        count = int(ray.cluster_resources().get("GPU", 0)) if gpus else len(ray.nodes())
    if count == 0:
        raise KeyeError(f"the cluster at {address} has no GPU: add nodes that have one, or give --device cpu")
    return [
        RayWorker(ray, settings, slots=slots, private=private, gpus=int(gpus), name=f"actor {number}")
        for number in range(count)
    ]


class Engine:
    """What runs on the cluster: the worker of one process, asked from elsewhere."""

    def __init__(self, settings: Mapping[str, Any], slots: int, private: bool) -> None:
        from keye.batch.child import load_engine

        self._worker = EngineWorker(load_engine(dict(settings)), slots=slots, private=private)

    async def start(self) -> int:
        """Makes it ready; the number of its process."""
        import os

        await self._worker.start()
        return os.getpid()

    async def ask(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = await self._worker.post(body)
        return answer.status, dict(answer.body)


class RayWorker:
    """One engine on a cluster, placed anew when it is lost."""

    def __init__(
        self, ray: Any, settings: Mapping[str, Any], *, slots: int, private: bool, gpus: int, name: str
    ) -> None:
        self.name, self.slots, self._ray, self._settings, self._private = name, slots, ray, settings, private
        # One more call than questions, for `start`.
        self._made = ray.remote(Engine).options(num_cpus=1, num_gpus=gpus, max_concurrency=slots + 1)
        self._actor: Any = None
        self.pid: int | None = None

    async def start(self) -> None:
        await self.close()
        self._actor = self._made.remote(dict(self._settings), self.slots, self._private)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                self.pid = await self._actor.start.remote()
        except TimeoutError:
            raise WorkerLost(f"{self.name} found no room on the cluster in {_READY_SECONDS / 60:g} minutes") from None
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(f"{self.name} could not start ({_first_line(error)})") from None

    async def ask(self, item: Item) -> Answer:
        if self._actor is None:
            raise WorkerLost(f"{self.name} has ended", during=False)
        try:
            status, body = await self._actor.ask.remote(own_model(item.body))
        except self._ray.exceptions.RayTaskError as error:  # of the engine, which goes on
            message = f"the engine failed: {_first_line(error.cause or error)}"
            return Answer(500, {"error": {"code": "engine_failed", "message": message}})
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(f"{self.name} was lost ({_first_line(error)})") from None
        return Answer(status, body)

    async def close(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)
            self._actor = None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
