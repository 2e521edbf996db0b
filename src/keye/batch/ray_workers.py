"""Engines of a batch as actors on a Ray cluster, one worker each. Paths of a manifest must mean the same files on all
its nodes, which have keye installed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from keye.batch.manifest import Item
from keye.batch.workers import Answer, EngineWorker, Worker, WorkerLost, without_model
from keye.cluster.ray_cluster import connect
from keye.errors import KeyeError

#: Makes an application of settings, the number of slots, and whether private addresses may be opened
#: (`keye.server.batch_engine.engine_app`).
MakeApp = Callable[[Mapping[str, Any], int, bool], Any]
#: Seconds in which a cluster must find room for an engine and the engine must load its model.
_READY_SECONDS: Final = 1800.0


def ray_workers(
    address: str,
    make_app: MakeApp,
    settings: Mapping[str, Any],
    *,
    count: int | None,
    slots: int,
    allow_private: bool = False,
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
        RayWorker(
            ray, (make_app, dict(settings), slots, allow_private), slots=slots, gpus=int(gpus), name=f"actor {number}"
        )
        for number in range(count)
    ]


class Engine:
    """What runs on the cluster: the worker of one process."""

    def __init__(self, make_app: MakeApp, settings: Mapping[str, Any], slots: int, allow_private: bool) -> None:
        self._worker = EngineWorker(make_app(settings, slots, allow_private), slots=slots)

    async def start(self) -> int:
        """Makes it ready and returns its process id."""
        await self._worker.start()
        return os.getpid()

    async def ask(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = await self._worker.post(body)
        return answer.status, dict(answer.body)


class RayWorker:
    """One engine on a cluster, placed again when it is lost. `arguments` are those of `Engine`."""

    def __init__(self, ray: Any, arguments: tuple[Any, ...], *, slots: int, gpus: int, name: str) -> None:
        self.name, self.slots, self._ray, self._arguments = name, slots, ray, arguments
        # One more call than questions, for `start`.
        self._actor_class = ray.remote(Engine).options(num_cpus=1, num_gpus=gpus, max_concurrency=slots + 1)
        self._actor: Any = None
        self.pid: int | None = None

    async def start(self) -> None:
        await self.close()
        self._actor = self._actor_class.remote(*self._arguments)
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
            status, body = await self._actor.ask.remote(without_model(item.body))
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
