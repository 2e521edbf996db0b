"""Connections, before there is a request that the guard could see: how many, and how long a head may take to arrive.

For uvicorn, as `Config(app, **uvicorn_options(limits))`; its own timers begin only after the first answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from ipaddress import ip_address
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from keye.server.limits import Limits
from keye.server.throttle import client_of


def uvicorn_options(limits: Limits) -> dict[str, Any]:
    """What uvicorn must be told: our protocol and the size of a head; nothing about itself in answers; no log of its
    own, which would hold query strings; no belief in X-Forwarded-For; no websockets."""
    return {
        "http": guarded_protocol(limits),
        "h11_max_incomplete_event_size": limits.header_bytes,
        "server_header": False,
        "access_log": False,
        "proxy_headers": False,
        "ws": "none",
    }


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """A protocol class whose connections share one count."""
    by_address: Counter[str] = Counter()

    class Guarded(H11Protocol):
        _address = ""
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._address = client_of(self.client[0] if self.client else None)
            by_address[self._address] += 1
            crowded = by_address[self._address] > limits.connections_per_address and not _is_loopback(self._address)
            if crowded or by_address.total() > limits.connections:
                transport.abort()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._timer is None:
                # The beginning of a further head on a connection that is kept alive.
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
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


def _is_loopback(address: str) -> bool:
    return address != "unknown" and ip_address(address).is_loopback
