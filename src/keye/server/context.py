"""What the routes share: the model, the engine, the files, and threads for whatever blocks."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

from fastapi import Request

from keye.api import Keye
from keye.engine.async_engine import AsyncEngine
from keye.engine.guide import GuideFactory
from keye.media.source.fetch import FetchPolicy
from keye.media.thumbnails import ThumbnailCache
from keye.models.adapters import Adapter
from keye.server.edge.errors import ApiError
from keye.server.errors import add_note
from keye.server.library import ServedLibrary
from keye.server.metrics import Metrics
from keye.server.searches import FinishedSearches, Jobs, SearchIndexes, Transcripts
from keye.server.settings import Settings
from keye.server.stores import FileStore, MediaOpener, ResponseStore
from keye.sessions.live import LiveSession
from keye.version import __version__

T = TypeVar("T")


#: Uploads probed, plans and pictures made and clips cut at once.
MAX_DECODING = 4


@dataclass(frozen=True)
class Context:
    """Made once at start-up. `guides` is None where llguidance is not installed; `salt` gives what keeps the caches of
    one owner from those of all others."""

    model: Keye
    engine: AsyncEngine
    settings: Settings
    files: FileStore
    guides: GuideFactory | None
    metrics: Metrics
    salt: Callable[[str], bytes]
    policy: FetchPolicy
    responses: ResponseStore
    library: ServedLibrary | None = None
    #: Indexes are made one at a time: each takes a core for as long as its video needs.
    indexing: asyncio.Lock = field(default_factory=asyncio.Lock)
    finished_searches: FinishedSearches = field(default_factory=FinishedSearches)
    thumbnails: ThumbnailCache = field(default_factory=ThumbnailCache)
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_DECODING))
    started: float = field(default_factory=time.time)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32, "keye-serve"))

    @cached_property
    def searches(self) -> Jobs:
        """Searches in videos."""
        return Jobs(self.in_thread, 2)

    @cached_property
    def scans(self) -> Jobs:
        """Scans of whole videos for cuts."""
        return Jobs(self.in_thread, 1)

    def stop_jobs(self) -> None:
        """Ends searches and scans soon: the server is ending."""
        self.searches.stop_all()
        self.scans.stop_all()

    @cached_property
    def indexes(self) -> SearchIndexes:
        return SearchIndexes(self.files, self.salt, self.settings.file_seconds)

    @cached_property
    def transcripts(self) -> Transcripts:
        return Transcripts(self.settings.transcriber, self.salt)

    @cached_property
    def live(self) -> LiveSessions:
        return LiveSessions(self.in_thread)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what blocks in a thread; notes of settings that are not honoured still reach the request."""
        context = copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, context.run, function, *arguments)

    async def decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same for what reads media outside the engine: at most `MAX_DECODING` calls at once. A
        cancelled call keeps its place until its thread has ended."""
        loop, context = asyncio.get_running_loop(), copy_context()
        await self.decoding.acquire()
        working = self.threads.submit(context.run, function, *arguments)

        def leave(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self.decoding.release)

        working.add_done_callback(leave)
        return await asyncio.wrap_future(working)

    def opener(self, owner: str) -> MediaOpener:
        """Opens the media of a request of this owner."""
        return MediaOpener(self.files, owner, self.policy, self.library)

    @cached_property
    def fingerprint(self) -> str:
        """What `system_fingerprint` says: the version of keye, and a hash that changes with the model's configuration
        and the way it computes. The same replies to the same seeds need at least the same fingerprint."""
        model = self.model
        facts = [model.name, model.runtime.attention, str(model.model.dtype), dict(model.config.raw)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return f"b{__version__}-{digest[:10]}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model here, the first one its own."""
        return self.settings.served_names or (self.model.name,)

    def adapter_of(self, name: str | None, *, strict: bool = False) -> Adapter | None:
        """The adapter that is called so; None for names of the model and, where they are not strict, all others.
        `ApiError` 404 for those where names are strict: where the settings say so, or an adapter is loaded."""
        adapters = self.model.adapters
        if name is not None and name in adapters:
            return self.model.runtime.resolve_adapter(name)
        is_strict = strict or self.settings.strict_model_name or bool(adapters)
        if is_strict and not self._is_own(name, strict=strict):
            known = " or ".join(map(repr, [*self.names, *adapters][:8]))
            sentence = f"the model {(name or '')[:100]!r} is not served here; use {known}"
            raise ApiError(404, sentence, param="model", code="model_not_found")
        return None

    def check_model(self, name: str | None, *, strict: bool = False) -> None:
        """Accepts any name of a model, with a note for one that is not served here; `ApiError` as in `adapter_of`."""
        if self.adapter_of(name, strict=strict) is None and not self._is_own(name, strict=strict):
            add_note(f"the model {(name or '')[:100]!r} is not served here: {self.names[0]!r} answers")

    def check_base(self, name: str | None) -> None:
        """The same for what the model computes without adapters; `ApiError` 400 for the name of one."""
        if self.adapter_of(name) is not None:
            sentence = f"{name!r} is an adapter, with which nothing can be searched; name {self.names[0]!r} here"
            raise ApiError(400, sentence, param="model")
        self.check_model(name)

    def adapter_name(self, name: str | None) -> str | None:
        """`name` where an adapter is called so; None where it stands for the model itself."""
        return None if self.adapter_of(name) is None else name

    def name_of(self, adapter: Adapter | None) -> str:
        """What replies call the model that has answered."""
        return self.names[0] if adapter is None else adapter.name

    def _is_own(self, name: str | None, *, strict: bool) -> bool:
        return (not name and not strict) or name in (*self.names, self.model.name)


def context_of(request: Request) -> Context:
    """The context that `create_app` made."""
    context = request.app.state.keye
    assert isinstance(context, Context)
    return context


def owner_of(request: Request) -> str:
    """The name of the key that the client has shown; "local" where none is needed."""
    return str(request.scope.get("keye.key") or "local")


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
    """The sessions of all owners; each works for one request at a time and releases its memory when it ends.
    `in_thread` runs a function in a thread."""

    def __init__(self, in_thread: Callable[..., Awaitable[Any]]) -> None:
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
