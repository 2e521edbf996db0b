"""/v1/live: a video that goes on while questions about it are asked. Sessions live in memory, for as long as they are
used."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.stream import ReplyStream
from keye.engine.request import Event
from keye.engine.request import Request as Job
from keye.errors import collect_warnings
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import spelled
from keye.server.live_sessions import IDLE_SECONDS
from keye.server.openai.events import Choice, each, growing, written
from keye.server.openai.schemas import LiveAppend, LiveAsk, LiveRequest
from keye.server.openai.sse import streamed, until_gone
from keye.server.routes.json_route import JsonRoute
from keye.sessions.answer import Collector
from keye.sessions.live import LiveSession

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/live")
async def create(request: Request, body: LiveRequest) -> JSONResponse:
    """Opens a session. `keep` "recent" forgets the oldest frames when the context is full."""
    context, owner = context_of(request), owner_of(request)
    context.check_model(body.model)

    def make() -> LiveSession:
        return context.model.live(keep=body.keep, **(body.preprocess_kwargs or {}))

    name = await context.live.open(owner, make)
    return JSONResponse({"id": name, "object": "keye.live", "idle_seconds": IDLE_SECONDS})


@router.post("/v1/live/{session_id}/frames")
async def append(request: Request, session_id: str, body: LiveAppend) -> JSONResponse:
    """Adds pictures with their seconds, or the frames of an uploaded clip that begins at `offset`."""
    context, owner = context_of(request), owner_of(request)
    if (body.file_id is None) == (body.frames is None):
        raise ApiError(400, "give frames with timestamps, or the file_id of a clip", param="frames")
    adding = context.live.work(session_id, owner, lambda live: _append(context, owner, live, body))
    return JSONResponse(await until_gone(request, adding))


def _append(context: Context, owner: str, live: LiveSession, body: LiveAppend) -> dict[str, Any]:
    with collect_warnings() as notes:
        if body.file_id is not None:
            live.append_video(context.files.get(body.file_id, owner).source(), offset=body.offset)
        else:
            live.append([context.policy.fetch(frame, "image") for frame in body.frames or ()], body.timestamps or [])
    found = {"object": "keye.live", "frames": live.frames, "tokens": live.tokens, "dropped": live.dropped}
    return {**found, "keye": {"notes": [note.worded(spelled) for note in notes]}}


@router.post("/v1/live/{session_id}/ask")
async def ask(request: Request, session_id: str, body: LiveAsk) -> Response:
    """Answers a question about all that was seen so far; frames may be added meanwhile. With `stream` as server-sent
    events, the answer last."""
    context = context_of(request)
    job = await until_gone(request, _job(context, owner_of(request), session_id, body))
    if body.stream:
        return await streamed(request, _written(context, job), at_once=True)
    return JSONResponse(await until_gone(request, _answer(context, job)))


async def _job(context: Context, owner: str, session_id: str, body: LiveAsk) -> Job:
    options = {name: getattr(body, name) for name in ("max_tokens", "temperature", "seed", "evidence")}
    job = await context.live.work(session_id, owner, lambda live: live.request(body.question, **options))
    return replace(job, salt=context.salt(owner), seconds=context.settings.request_seconds)


async def _answer(context: Context, job: Job) -> dict[str, Any]:
    collector = Collector(job, context.name)
    async with aclosing(each(context, job)) as events:
        async for event in events:
            collector.take(event)
    return _answer_object(collector)


def _written(context: Context, job: Job) -> AsyncGenerator[bytes, None]:
    collector, choice = Collector(job, context.name), Choice(ReplyStream())
    begin = {"object": "keye.live.answer.chunk", "model": context.name}
    growth = growing(choice, begin, lambda _: _answer_object(collector))

    def told(event: Event) -> Iterator[bytes]:
        collector.take(event)
        yield from growth(event)

    return written(context, job, told)


def _answer_object(collector: Collector) -> dict[str, Any]:
    assert collector.answer is not None
    return {"object": "keye.live.answer", **collector.answer.to_dict()}


@router.delete("/v1/live/{session_id}")
async def end(request: Request, session_id: str) -> JSONResponse:
    """Ends a session."""
    context_of(request).live.end(session_id, owner_of(request))
    return JSONResponse({"id": session_id, "object": "keye.live", "deleted": True})
