"""Live sessions of all clients, in memory for as long as they are used."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from keye.server.edge.errors import ApiError
from keye.sessions.live import LiveSession

T = TypeVar("T")
#: Runs a function in a thread (`Context.in_thread`).
InThread = Callable[..., Awaitable[Any]]
#: Most sessions of one key, and seconds after which an unused one ends.
MAX_SESSIONS: Final = 8
IDLE_SECONDS: Final = 600.0


@dataclass
class _Session:
    """`turn` serialises requests, `lock` is held while a thread works on the session, even if its client has gone."""

    owner: str
    live: LiveSession
    used: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    lock: threading.Lock = field(default_factory=threading.Lock)


class LiveSessions:
    """The sessions of all owners; each works for one request at a time and releases its memory when it ends."""

    def __init__(self, in_thread: InThread) -> None:
        self._in_thread = in_thread
        self._sessions: dict[str, _Session] = {}
        self._opening: Counter[str] = Counter()

    async def open(self, owner: str, make: Callable[[], LiveSession]) -> str:
        """A new session's id; `ApiError` 429 where the owner has too many."""
        self.sweep()
        mine = sum(session.owner == owner for session in self._sessions.values())
        if mine + self._opening[owner] >= MAX_SESSIONS:
            raise ApiError(429, f"{MAX_SESSIONS} live sessions are open; end one first", code="too_many", retry=60)
        self._opening[owner] += 1
        try:
            live = await self._in_thread(make)
        finally:
            self._opening[owner] -= 1
        name = f"live-{secrets.token_hex(16)}"
        self._sessions[name] = _Session(owner, live, time.monotonic())
        return name

    async def work(self, name: str, owner: str, function: Callable[[LiveSession], T]) -> T:
        """Calls `function` with a session in a thread; `ApiError` 404 for one of another owner, or that has ended."""
        session = self._get(name, owner)

        def locked() -> T:
            with session.lock:
                session.used = time.monotonic()
                try:
                    return function(session.live)
                finally:
                    session.used = time.monotonic()

        async with session.turn:
            result: T = await self._in_thread(locked)
        return result

    def end(self, name: str, owner: str) -> None:
        """Ends a session; a request that still works on it goes on."""
        self._get(name, owner)
        del self._sessions[name]

    def sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Ends sessions that were not used for `idle` seconds."""
        oldest = time.monotonic() - idle
        for name, session in list(self._sessions.items()):
            if session.used < oldest and not session.lock.locked():
                del self._sessions[name]

    def close(self) -> None:
        """Ends all sessions."""
        self._sessions.clear()

    def _get(self, name: str, owner: str) -> _Session:
        self.sweep()
        session = self._sessions.get(name)
        if session is None or session.owner != owner:
            raise ApiError(404, "no live session has this id; open one", param="session_id", code="not_found")
        return session
