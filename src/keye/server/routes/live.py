"""/v1/live: frames are appended to a video while questions about it are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.stream import ReplyStream
from keye.engine.request import Event, GenerationRequest
from keye.errors import collect_warnings
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import spelled
from keye.server.live_sessions import IDLE_SECONDS
from keye.server.openai.events import ChatReply, KeyeStreamEncoder, encode_events, iter_events
from keye.server.openai.http import JsonRoute, cancel_on_disconnect, stream_events
from keye.server.openai.schemas import LiveAppend, LiveAsk, LiveRequest
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
    return JSONResponse(await cancel_on_disconnect(request, adding))


def _append(context: Context, owner: str, live: LiveSession, body: LiveAppend) -> dict[str, Any]:
    with collect_warnings() as notes:
        if body.file_id is not None:
            live.append_video(context.files.get(body.file_id, owner).source(), offset=body.offset)
        else:
            live.append([context.policy.fetch(frame, "image") for frame in body.frames or ()], body.timestamps or [])
    return {
        "object": "keye.live", "frames": live.frames, "tokens": live.tokens, "dropped": live.dropped,
        "keye": {"notes": [note.worded(spelled) for note in notes]},
    }  # fmt: skip


@router.post("/v1/live/{session_id}/ask")
async def ask(request: Request, session_id: str, body: LiveAsk) -> Response:
    """Answers a question about all frames so far; more may be added meanwhile. With `stream` as server-sent events, the
    answer last."""
    context, owner = context_of(request), owner_of(request)
    question = await cancel_on_disconnect(request, _generation_request(context, owner, session_id, body))
    collector = Collector(question, context.names[0])
    if not body.stream:
        return JSONResponse(await cancel_on_disconnect(request, _collect(context, question, collector)))
    begin = {"object": "keye.live.answer.chunk", "model": context.names[0]}
    encoder = KeyeStreamEncoder(ChatReply(ReplyStream()), begin, lambda _: _answer_object(collector))

    def encode(event: Event) -> Iterator[bytes]:
        collector.take(event)
        yield from encoder.encode(event)

    return await stream_events(request, encode_events(context, (question, encode)), at_once=True)


async def _generation_request(context: Context, owner: str, session_id: str, body: LiveAsk) -> GenerationRequest:
    options = {name: getattr(body, name) for name in ("max_tokens", "temperature", "seed", "evidence")}
    request = await context.live.work(session_id, owner, lambda live: live.request(body.question, **options))
    return replace(request, salt=context.salt(owner), seconds=context.settings.request_seconds)


async def _collect(context: Context, request: GenerationRequest, collector: Collector) -> dict[str, Any]:
    async with aclosing(iter_events(context, request)) as events:
        async for event in events:
            collector.take(event)
    return _answer_object(collector)


def _answer_object(collector: Collector) -> dict[str, Any]:
    assert collector.answer is not None
    return {"object": "keye.live.answer", **collector.answer.to_dict()}


@router.delete("/v1/live/{session_id}")
async def end(request: Request, session_id: str) -> JSONResponse:
    """Ends a session."""
    context_of(request).live.end(session_id, owner_of(request))
    return JSONResponse({"id": session_id, "object": "keye.live", "deleted": True})
