"""Engines of a batch as actors on a Ray cluster, one worker each. Paths of a manifest must mean the same files on all
its nodes, which have keye installed.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from typing import Any, Final

from keye.cluster.batch_workers import Answer, EngineWorker, Worker, WorkerLost, own_model
from keye.cluster.manifest import Item
from keye.errors import KeyeError

#: Seconds in which the port of a cluster must answer.
_REACH_SECONDS: Final = 5.0
#: Seconds in which a cluster must find room for an engine and the engine must load its model.
_READY_SECONDS: Final = 1800.0


def ray_workers(address: str, settings: Mapping[str, Any], *, count: int | None, slots: int) -> list[Worker]:
    """`count` workers on the cluster at `address` (see `connect`): by default one for each GPU where engines run on
    GPUs, else one for each node."""
    ray = connect(address)
    gpus = str(settings.get("device", "cpu")).startswith("cuda")
    if count is None:
        count = int(ray.cluster_resources().get("GPU", 0)) if gpus else len(ray.nodes())
    if count == 0:
        raise KeyeError(f"the cluster at {address} has no GPU: add nodes that have one, or give --device cpu")
    return [RayWorker(ray, settings, slots=slots, gpus=int(gpus), name=f"actor {number}") for number in range(count)]


def connect(address: str) -> Any:
    """The module `ray`, connected: to HOST:PORT or ray://HOST:PORT, to the cluster of this machine ("auto"), or to one
    that lives in processes of this program ("local"). `KeyeError` where there is none."""
    try:
        import ray
    except ModuleNotFoundError:
        raise KeyeError("ray is not installed, which --ray needs; install keye[ray]") from None
    if ray.is_initialized():
        return ray
    if address not in ("auto", "local"):
        _reach(address)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        told = " ".join(str(error).split())[:200]
        raise KeyeError(f"no Ray cluster can be used at {address} ({told}): check --ray") from None
    return ray


def _reach(address: str) -> None:
    """Ray itself waits for minutes where nobody answers."""
    match = re.fullmatch(r"(?:ray://)?(\[[0-9A-Fa-f:]+\]|[^:/\s]+):(\d{1,5})", address)
    if match is None:
        raise KeyeError(f"{address!r} is no address of a Ray cluster: give HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise KeyeError(f"nothing answers at {address} ({error}): check --ray, and that the cluster runs") from None


class Engine:
    """What runs on the cluster: the worker of one process, asked from elsewhere."""

    def __init__(self, settings: Mapping[str, Any], slots: int) -> None:
        from keye.cluster.batch_child import load_engine

        self._worker = EngineWorker(load_engine(dict(settings)), slots=slots)

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

    def __init__(self, ray: Any, settings: Mapping[str, Any], *, slots: int, gpus: int, name: str) -> None:
        self.name, self.slots, self._ray, self._settings = name, slots, ray, settings
        # One more call than questions, for `start`.
        self._made = ray.remote(Engine).options(num_cpus=1, num_gpus=gpus, max_concurrency=slots + 1)
        self._actor: Any = None
        self.pid: int | None = None

    async def start(self) -> None:
        await self.close()
        self._actor = self._made.remote(dict(self._settings), self.slots)
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
