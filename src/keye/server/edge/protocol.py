"""Connections, before there is a request that the guard could see: how many, and how long a head may take to arrive.

Where there are too many, the longest idle one is closed, those of clients without a key first: a client that holds
connections open cannot lock others out.

For uvicorn, as `Config(app, **uvicorn_options(limits))`; its own timers begin only after the first answer.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from dataclasses import replace
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from keye.server.edge.limits import Limits, client_of
from keye.server.edge.request_head import is_loopback

#: Open files that a server needs beside its connections: workers, uploads, libraries.
_OTHER_FILES: Final = 512


def uvicorn_options(limits: Limits) -> dict[str, Any]:
    """Options of uvicorn: our protocol and the size of a head; nothing about itself in answers; no log of its own,
    which would hold query strings; no belief in X-Forwarded-For; no websockets."""
    return {
        "http": guarded_protocol(limits), "h11_max_incomplete_event_size": limits.header_bytes, "server_header": False,
        "access_log": False, "proxy_headers": False, "ws": "none",
    }  # fmt: skip


class Idle:
    """Connections on which no request runs, in the order in which they became idle: those whose last request had a
    valid key, and unknown ones."""

    def __init__(self) -> None:
        self.unknown: dict[asyncio.Transport, str] = {}
        self.known: dict[asyncio.Transport, str] = {}

    def add(self, transport: asyncio.Transport, address: str, *, known: bool) -> None:
        (self.known if known else self.unknown)[transport] = address

    def drop(self, transport: asyncio.Transport) -> None:
        self.unknown.pop(transport, None)
        self.known.pop(transport, None)

    def close_oldest(self, address: str | None, but: asyncio.Transport) -> bool:
        """Closes the connection, of this address if one is given, that has been idle for longest; False without any."""
        for idle in (self.unknown, self.known):
            for transport, whose in idle.items():
                if address in (None, whose) and transport is not but:
                    self.drop(transport)
                    transport.abort()
                    return True
        return False


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """A protocol class whose connections share one count."""
    by_address: Counter[str] = Counter()
    idle = Idle()

    class Guarded(H11Protocol):
        _address = ""
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._address = client_of(self.client[0] if self.client else None)
            by_address[self._address] += 1
            crowded = by_address[self._address] > limits.connections_per_address and not is_loopback(self._address)
            full = by_address.total() > limits.connections
            idle.add(transport, self._address, known=False)
            # An aborted connection is counted until the loop calls its `connection_lost`, in its next iteration.
            if (crowded or full) and not idle.close_oldest(self._address if crowded else None, transport):
                transport.abort()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
                idle.drop(self.transport)
            elif self._timer is None:
                # The beginning of a further head on a connection that is kept alive.
                self._wait_for_head()

        def on_response_complete(self) -> None:
            known = bool(self.cycle is not None and self.cycle.scope.get("keye.key"))
            self.timeout_keep_alive = limits.keep_alive_seconds if known else limits.unknown_seconds
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                idle.add(self.transport, self._address, known=known)
                if self.conn.trailing_data[0] and self._timer is None:
                    self._wait_for_head()  # the beginning of a further head has come already

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            idle.drop(self.transport)
            by_address[self._address] -= 1
            if not by_address[self._address]:
                del by_address[self._address]
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._timer = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Guarded


def limits_of_system(limits: Limits) -> Limits:
    """The limits with no more connections than this process may have open files beside `_OTHER_FILES`; the soft limit
    of the system is raised as far as that needs and as it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return replace(limits, connections=max(min(limits.connections, soft - _OTHER_FILES), 16))
    return limits
