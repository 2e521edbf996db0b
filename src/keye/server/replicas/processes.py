"""Replicas of the server: processes that run `keye serve` on ports of this machine only, restarted when they end.

Knows processes and HTTP, no requests; `keye.server.replicas.proxy` decides which replica gets which request.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx

from keye.errors import KeyeError
from keye.process import ChildProcess

log: Final = logging.getLogger("keye.server")
#: Longest wait before a replica is restarted, in seconds.
_LONGEST_WAIT: Final = 30.0
#: Seconds in which a replica must have ended after SIGTERM: more than it gives running requests.
_CLOSE_SECONDS: Final = 45.0


class ReplicaLost(Exception):
    """A replica ended before its answer was complete."""


@dataclass(frozen=True)
class Reply:
    """An answer: `pieces` of its body as they come (`ReplicaLost` where the replica ends before them); `close` ends it
    early."""

    status: int
    headers: Mapping[str, str]
    pieces: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]


class Replica(Protocol):
    """One server. `is_ready`: it can be sent requests."""

    name: str

    @property
    def is_ready(self) -> bool: ...

    async def start(self) -> None:
        """Starts it and returns when it listens; `KeyeError` where it cannot."""

    async def wait_ended(self) -> None: ...

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes]
    ) -> Reply:
        """Sends a request; `ReplicaLost` where the replica ends before it answers."""

    async def kill(self) -> None:
        """Ends it at once, also when it no longer responds."""

    async def close(self) -> None: ...


#: How a replica is started that is `keye serve` on a free port of this machine.
_SERVE: Final = ("-m", "keye", "serve", "--host", "127.0.0.1", "--port", "0")


class LocalReplica:
    """A child process that ends with this one. `arguments` are those of `keye serve`, without host and port, or follow
    the interpreter where a `message` is sent to the child: see `keye.process.ChildProcess`. It reports its `address`,
    and the `socket` that it listens on where that is none of the network."""

    def __init__(self, name: str, arguments: Sequence[str], message: Mapping[str, Any] | None = None) -> None:
        self.name, self._message = name, message
        self._command = (*_SERVE, *arguments, "--ready-fd") if message is None else tuple(arguments)
        self._process: ChildProcess | None = None
        self._http: httpx.AsyncClient | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def is_ready(self) -> bool:
        return self._http is not None and self._process is not None and self._process.is_running

    async def start(self) -> None:
        await self.close()
        self._process = ChildProcess(self._command, self._message)
        report = await asyncio.to_thread(self._process.read_report)
        if report is None:
            raise KeyeError(f"replica {self.name} could not start; see its messages above")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        times = httpx.Timeout(None, connect=10.0)
        transport = httpx.AsyncHTTPTransport(limits=limits, uds=report.get("socket"))
        self._http = httpx.AsyncClient(base_url=report["address"], timeout=times, transport=transport)

    async def wait_ended(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes]
    ) -> Reply:
        if self._http is None:
            raise ReplicaLost(self.name)
        request = self._http.build_request(method, path, headers=dict(headers), content=content or None)
        try:
            answer = await self._http.send(request, stream=True)
        except (httpx.TransportError, RuntimeError) as error:
            raise ReplicaLost(f"{self.name}: {error}") from None
        return Reply(answer.status_code, answer.headers, self._pieces(answer), answer.aclose)

    async def _pieces(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        except (httpx.TransportError, httpx.StreamError) as error:
            raise ReplicaLost(f"{self.name}: {error}") from None

    async def kill(self) -> None:
        """Ends the child with all that it has started."""
        if self._process is not None:
            self._process.kill()
            await self.wait_ended()

    async def close(self) -> None:
        """SIGTERM lets running requests end; a child that does not end in time is killed."""
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                await self.kill()
            self._process.close()
            self._process = None
        if self._http is not None:
            await self._http.aclose()
            self._http = None


async def restart_when_ended(replica: Replica, on_lost: Callable[[str], None]) -> None:
    """Starts a replica again whenever it ends, after a wait that doubles while it cannot start; calls `on_lost` with
    its name each time."""
    wait = 1.0
    while True:
        await replica.wait_ended()
        on_lost(replica.name)
        log.warning("replica %s has ended and is started again", replica.name)
        while not replica.is_ready:
            try:
                await replica.start()
            except KeyeError as error:
                log.warning("%s", error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            else:
                wait = 1.0


async def start_all(replicas: Sequence[Replica]) -> None:
    """Starts all; where one cannot, none is left."""
    results = await asyncio.gather(*(replica.start() for replica in replicas), return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            await close_all(replicas)
            raise error


async def close_all(replicas: Sequence[Replica]) -> None:
    """Ends all, together."""
    with suppress(ProcessLookupError):
        await asyncio.gather(*(replica.close() for replica in replicas))


#: Seconds between two questions; without an answer for how long a replica is passed over, and ended.
PAUSE: Final = 0.5
SILENT_SECONDS: Final = 2.0
LOST_SECONDS: Final = 15.0


class Watch:
    """The times at which replicas have answered last. `watch` follows one for as long as it runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last_answers: dict[str, float] = {}

    def is_silent(self, replica: Replica) -> bool:
        """Whether a replica that runs has not answered for a while."""
        last = self.last_answers.get(replica.name)
        return replica.is_ready and last is not None and self._clock() - last > SILENT_SECONDS

    async def watch(self, replica: Replica, *, pause: float = PAUSE) -> None:
        """Asks again and again; ends what does not answer for `LOST_SECONDS`, so that it is started again."""
        while True:
            if not replica.is_ready:
                self.last_answers.pop(replica.name, None)
            elif await _is_healthy(replica):
                self.last_answers[replica.name] = self._clock()
            elif self._clock() - self.last_answers.setdefault(replica.name, self._clock()) > LOST_SECONDS:
                log.warning("replica %s has not answered for %g s and is ended", replica.name, LOST_SECONDS)
                await replica.kill()
                self.last_answers.pop(replica.name, None)
            await asyncio.sleep(pause)


async def _is_healthy(replica: Replica) -> bool:
    try:
        async with asyncio.timeout(SILENT_SECONDS):
            reply = await replica.send("GET", "/health", {}, b"")
            await reply.close()
            return reply.status == 200
    except (TimeoutError, ReplicaLost):
        return False
