"""/v1/live: a video that goes on while questions about it are asked. Sessions live in memory, for as long as they are
used."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from keye.engine.live import LiveSession
from keye.media.fetch import Source
from keye.media.image import read_image
from keye.server.context import Context, context_of, owner_of
from keye.server.errors import ApiError
from keye.server.schemas import LiveAppend, LiveAsk, LiveRequest

T = TypeVar("T")
router = APIRouter()
#: Sessions of one key, and seconds after which an unused one ends.
MOST_SESSIONS: Final = 8
IDLE_SECONDS: Final = 600.0


@dataclass
class _Session:
    owner: str
    live: LiveSession
    used: float
    lock: threading.Lock = field(default_factory=threading.Lock)


class LiveStore:
    """The sessions of all owners. Safe to share by threads; each session works for one request at a time."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def open(self, owner: str, make: Callable[[], LiveSession]) -> str:
        """A new session's id; `ApiError` 429 where the owner has too many."""
        self.sweep()
        with self._lock:
            if sum(session.owner == owner for session in self._sessions.values()) >= MOST_SESSIONS:
                raise ApiError(429, f"{MOST_SESSIONS} live sessions are open; end one first", code="too_many", retry=60)
            name = f"live-{secrets.token_hex(16)}"
            self._sessions[name] = _Session(owner, make(), time.monotonic())
        return name

    def work(self, name: str, owner: str, what: Callable[[LiveSession], T]) -> T:
        """Does something with a session; `ApiError` 404 for one that is not this owner's, or has ended."""
        session = self._get(name, owner)
        with session.lock:
            session.used = time.monotonic()
            return what(session.live)

    def end(self, name: str, owner: str) -> None:
        """Ends a session and frees what it holds."""
        session = self._get(name, owner)
        with self._lock:
            self._sessions.pop(name, None)
        with session.lock:
            session.live.close()

    def sweep(self, idle: float = IDLE_SECONDS) -> None:
        """Ends sessions that nobody has used for a while."""
        oldest = time.monotonic() - idle
        with self._lock:
            late = [name for name, session in self._sessions.items() if session.used < oldest]
            ended = [self._sessions.pop(name) for name in late]
        for session in ended:
            with session.lock:
                session.live.close()

    def _get(self, name: str, owner: str) -> _Session:
        with self._lock:
            session = self._sessions.get(name)
        if session is None or session.owner != owner:
            raise ApiError(404, "there is no live session of this id; open one", param="session_id", code="not_found")
        return session


@router.post("/v1/live")
async def create(request: Request, body: LiveRequest) -> JSONResponse:
    """Opens a session. `keep` "recent" forgets the oldest frames when the context is full."""
    context, owner = context_of(request), owner_of(request)
    context.check_model(body.model)

    def make() -> LiveSession:
        return context.model.live(keep=body.keep, **(body.preprocess_kwargs or {}))

    name = await context.in_thread(context.live.open, owner, make)
    return JSONResponse({"id": name, "object": "keye.live", "idle_seconds": IDLE_SECONDS})


@router.post("/v1/live/{session_id}/frames")
async def append(request: Request, session_id: str, body: LiveAppend) -> JSONResponse:
    """Adds pictures with their seconds, or the frames of an uploaded clip that begins at `offset`."""
    context, owner = context_of(request), owner_of(request)
    if (body.file_id is None) == (body.frames is None):
        raise ApiError(400, "give frames with timestamps, or the file_id of a clip", param="frames")
    told = await context.in_thread(
        context.live.work, session_id, owner, lambda live: _append(context, owner, live, body)
    )
    return JSONResponse(told)


def _append(context: Context, owner: str, live: LiveSession, body: LiveAppend) -> dict[str, Any]:
    if body.file_id is not None:
        live.append_video(context.files.get(body.file_id, owner).source(), offset=body.offset)
    else:
        policy = context.policy
        pictures = [policy.fetch(frame, "image") for frame in body.frames or ()]
        assert all(isinstance(picture, Source) for picture in pictures)
        live.append([read_image(picture).convert("RGB") for picture in pictures], body.timestamps or [])
    return {"object": "keye.live", "frames": live.frames, "tokens": live.tokens, "dropped": live.dropped}


@router.post("/v1/live/{session_id}/ask")
async def ask(request: Request, session_id: str, body: LiveAsk) -> JSONResponse:
    """Answers a question about all that was seen so far."""
    context, owner = context_of(request), owner_of(request)
    options = {name: getattr(body, name) for name in ("max_tokens", "temperature", "seed")}

    def work(live: LiveSession) -> dict[str, Any]:
        return live.ask(body.question, evidence=body.evidence, **options).to_dict()

    answer = await context.in_thread(context.live.work, session_id, owner, work)
    return JSONResponse({"object": "keye.live.answer", **answer})


@router.delete("/v1/live/{session_id}")
async def end(request: Request, session_id: str) -> JSONResponse:
    """Ends a session."""
    context = context_of(request)
    await context.in_thread(context.live.end, session_id, owner_of(request))
    return JSONResponse({"id": session_id, "object": "keye.live", "deleted": True})
