"""Replicas of the server on a Ray cluster: applications of Ray Serve with one replica each, which Serve places, watches
and restarts. Requests reach them by Serve's handles, not over HTTP: no port is opened on the nodes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from keye.cluster.ray_cluster import connect
from keye.errors import KeyeError, missing_package
from keye.server.edge.errors import ApiError
from keye.server.replicas.processes import ReplicaLost, Reply
from keye.server.settings import Settings, guard_settings
from keye.units import MIB, format_bytes

#: Largest upload, in bytes: a request travels as one message.
MAX_UPLOAD_BYTES: Final = 256 * MIB
_QUEUED: Final = 64


class Server:
    """What runs on the cluster: the guarded application, called without a socket. `settings` are those of
    `keye.server.batch_engine.load_engine`."""

    def __init__(self, settings: Mapping[str, Any], serving: Settings) -> None:
        from keye.server.app import create_app
        from keye.server.batch_engine import load_engine
        from keye.server.edge.guard import Guard

        guard = guard_settings(serving)
        self._inner = create_app(load_engine(settings), serving, salt=guard.keys.salt)
        self._app = Guard(self._inner, guard)
        self._life: Any = None
        self._name = secrets.token_hex(8)

    async def name(self) -> str:
        """Another one after each start; with it the application is ready."""
        if self._life is None:
            self._life = self._inner.router.lifespan_context(self._inner)
            await self._life.__aenter__()
        return self._name

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncGenerator[tuple[int, dict[str, str], str] | bytes, None]:
        """Status and headers of the answer with the name of who answers, then its body in pieces."""
        name = await self.name()  # Serve may just have restarted it
        async for message in called(self._app, method, path, headers, body):
            if message["type"] == "http.response.start":
                head = {key.decode(): value.decode("latin-1") for key, value in message["headers"]}
                yield message["status"], head, name
            elif message.get("body"):
                yield message["body"]


async def called(
    app: Any, method: str, path: str, headers: Mapping[str, str], body: bytes
) -> AsyncGenerator[dict[str, Any], None]:
    """What an ASGI application sends for one request. Closing this signals a disconnect."""
    plain, _, query = path.partition("?")
    all_headers = {"host": "127.0.0.1", **headers}
    if body:
        all_headers["content-length"] = str(len(body))
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": method,
        "path": plain, "raw_path": plain.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in all_headers.items()],
        "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_QUEUED)
    disconnected, left = asyncio.Event(), [body]

    async def receive() -> dict[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, sent.put)
        finally:
            await sent.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        disconnected.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class RayReplica:
    """One application of Ray Serve. `ray` is connected."""

    def __init__(self, ray: Any, name: str, settings: Mapping[str, Any], serving: Settings) -> None:
        from ray import serve

        self.name, self._ray = name, ray
        gpus = int(str(settings.get("device", "cpu")).startswith("cuda"))
        deployment = serve.deployment(Server).options(  # here and not in a thread: Ray does not make two at a time
            num_replicas=1, max_ongoing_requests=serving.queue,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        )  # fmt: skip
        self._application = deployment.bind(dict(settings), serving)
        self._handle: Any = None
        self._instance: str | None = None
        self._lost = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        return self._instance is not None

    async def start(self) -> None:
        """Waits for Serve, which restarts it by itself."""
        from ray import serve

        try:
            if self._handle is None:
                run = partial(serve.run, self._application, name=f"keye-{self.name}", route_prefix=None)
                self._handle = await asyncio.to_thread(run)
            self._instance = await self._handle.name.remote()
        except (self._ray.exceptions.RayError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise KeyeError(f"replica {self.name} could not start on the cluster ({reason})") from None
        self._lost.clear()

    async def wait_ended(self) -> None:
        await self._lost.wait()

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes]
    ) -> Reply:
        if self._handle is None or self._instance is None:
            raise ReplicaLost(self.name)
        body = content if isinstance(content, bytes) else await _joined(content)
        pieces = self._handle.options(stream=True).send.remote(method, path, dict(headers), body)
        try:
            status, reply_headers, instance = await anext(pieces)
        except (self._ray.exceptions.RayError, StopAsyncIteration) as error:
            self._forget()
            raise ReplicaLost(f"{self.name}: {error}") from None

        if instance != self._instance:
            self._forget()

        async def close() -> None:
            pieces.cancel()

        async def checked() -> AsyncIterator[bytes]:
            try:
                async for piece in pieces:
                    yield piece
            except self._ray.exceptions.RayError as error:
                self._forget()
                raise ReplicaLost(f"{self.name}: {error}") from None

        return Reply(status, reply_headers, checked(), close)

    async def kill(self) -> None:
        """Serve watches it and starts it again; until then it is not asked."""
        self._forget()

    def _forget(self) -> None:
        """It has ended, or another has taken its place; `start` finds out which."""
        self._instance = None
        self._lost.set()

    async def close(self) -> None:
        if self._handle is not None:
            from ray import serve

            self._handle = self._instance = None
            await asyncio.to_thread(serve.delete, f"keye-{self.name}")


def ray_replicas(address: str, count: int, settings: Mapping[str, Any], serving: Settings) -> list[RayReplica]:
    """`count` replicas on the cluster at `address` (see `ray_cluster.connect`); `KeyeError` where that cannot be."""
    ray, _ = connect(address)
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "Ray Serve", "ray") from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    return [RayReplica(ray, str(number), settings, serving) for number in range(count)]


async def _joined(content: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for piece in content:
        body += piece
        if len(body) > MAX_UPLOAD_BYTES:
            most = format_bytes(MAX_UPLOAD_BYTES)
            raise ApiError(413, f"replicas on Ray take uploads of at most {most}; send an address", param="file")
    return bytes(body)
