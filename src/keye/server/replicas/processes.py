"""Replicas of the server: processes that run `keye serve` on ports of this machine only, started anew when they end.

Knows processes and HTTP, not what is asked; which replica is asked, and what for, is decided in `replicas_proxy`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import httpx

from keye.errors import KeyeError

log: Final = logging.getLogger("keye.server")
#: Longest wait before a replica is started anew, in seconds.
_LONGEST_WAIT: Final = 30.0
#: Seconds in which a replica must have ended after SIGTERM: more than it gives running requests.
_CLOSE_SECONDS: Final = 45.0


class ReplicaLost(Exception):
    """A replica ended before its answer was complete."""


@dataclass(frozen=True)
class Reply:
    """What a replica answers: `pieces` of the body as they come (`ReplicaLost` where it ends before them), `close` ends
    it early."""

    status: int
    headers: Mapping[str, str]
    pieces: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]


class Replica(Protocol):
    """One server. `alive` says whether it can be asked."""

    name: str

    @property
    def alive(self) -> bool: ...

    async def start(self) -> None:
        """Starts it, and returns when it answers; `KeyeError` where it cannot."""

    async def ended(self) -> None:
        """Waits until it is gone."""

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes]
    ) -> Reply:
        """Asks; `ReplicaLost` where it is gone before it answers."""

    async def kill(self) -> None:
        """Ends it at once, although it may not listen any more."""

    async def close(self) -> None: ...


class LocalReplica:
    """A child process. `arguments` are those of `keye serve`, without host and port; it ends with this process."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name, self._arguments = name, tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._http: httpx.AsyncClient | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        return self._http is not None and self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        await self.close()
        command = [sys.executable, "-m", "keye", "serve", *self._arguments]
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0", "--with-parent"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        address = await asyncio.to_thread(self._read_address, self._process)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(base_url=address, timeout=httpx.Timeout(None, connect=10.0), limits=limits)

    def _read_address(self, process: subprocess.Popen[bytes]) -> str:
        """From the block that `keye serve` prints; all of it is read, so that the child never waits for us."""
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            name, _, value = line.decode(errors="replace").partition(" ")
            address = value.strip() if name == "address" else address
            if name == "sandbox":  # the last line
                return address
        raise KeyeError(f"replica {self.name} could not start; what it told stands above")

    async def ended(self) -> None:
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
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self.ended()

    async def close(self) -> None:
        """SIGTERM lets what is under way end; this waits for it, and ends what does not end by itself."""
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, _CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                await self.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
        if self._http is not None:
            await self._http.aclose()
            self._http = None


async def keep_alive(replica: Replica, lost: Callable[[str], None]) -> None:
    """Starts a replica anew whenever it ends, after a wait that doubles while it does not come up; `lost` is told each
    time."""
    wait = 1.0
    while True:
        await replica.ended()
        lost(replica.name)
        log.warning("replica %s has ended and is started again", replica.name)
        while not replica.alive:
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
