"""keye's own routes for media: the plan of a request, when something happens in a video, clips that show it; and
/v1/live: frames are appended to a video while questions about it are asked."""

from __future__ import annotations

import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask

from keye.chat.stream import ReplyStream
from keye.config.media import MediaOptions, media_options
from keye.engine.request import Event, Finished, GenerationRequest
from keye.errors import collect_warnings
from keye.media.clips import cut_clips
from keye.media.source.fetch import Source
from keye.server.context import IDLE_SECONDS, Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import spelled
from keye.server.openai.events import (
    ChatReply,
    Continuation,
    collect,
    collect_chat,
    encode_events,
    keye_encoder,
    keye_fields,
    usage_of,
)
from keye.server.openai.http import Cancelled, JsonRoute, cancel_on_disconnect, stream_events
from keye.server.openai.media_parts import media_of, media_settings, open_sources, to_messages
from keye.server.openai.prepare import ChatQuery, PreparedChat, prepare_chat
from keye.server.openai.video_schemas import ClipsRequest, GroundRequest, LiveAppend, LiveAsk, LiveRequest, PlanRequest
from keye.server.stores import is_stored
from keye.sessions.answer import Collector
from keye.sessions.live import LiveSession

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/media/plan")
async def plan(request: Request, body: PlanRequest) -> JSONResponse:
    """Which frames would be sampled and what they would cost. Only the index of a video is read; frames given as
    pictures are opened."""
    context = context_of(request)
    context.check_model(body.model)
    return JSONResponse(await cancel_on_disconnect(request, context.decode(_plan, context, owner_of(request), body)))


def _plan(context: Context, owner: str, body: PlanRequest) -> dict[str, Any]:
    opener = context.opener(owner)
    messages = to_messages([{"role": "user", "content": body.content}], opener, body.preprocess_kwargs)
    if not media_of(messages):
        raise ApiError(400, "content holds no medium; give a video_url or an image_url", param="content")
    if (count := len(media_of(messages))) > context.settings.media:
        raise ApiError(400, f"content holds {count} media, more than {context.settings.media}", param="content")
    model = context.model
    with collect_warnings() as notes:
        segments = model.render(open_sources(messages, opener))
        measured = model.measure(segments, context.salt(owner))
    limit = model.config.text.max_position_embeddings
    lacking = {"frames": 1, "timestamps": [], "duration": None}  # of images
    return {
        "media": [{**lacking, "tokens_per_frame": plan["visual_tokens"], **plan} for plan in measured.media],
        "visual_tokens": measured.media_tokens, "prompt_tokens": measured.prompt_tokens, "context": limit,
        "fits": measured.prompt_tokens < limit, "keye": {"notes": [note.worded(spelled) for note in notes]},
    }  # fmt: skip


@router.post("/v1/video/ground")
async def ground(request: Request, body: GroundRequest) -> Response:
    """When an event happens in a video, in seconds; with `stream` as server-sent events, the answer last."""
    context = context_of(request)
    question = context.model.ground_question(body.event)
    messages = [{"role": "user", "content": [body.video, {"type": "text", "text": question}]}]
    query = ChatQuery(messages, body, body.max_tokens, media_defaults=media_settings(body), evidence=body.evidence)
    chat = await prepare_chat(request, query)
    media = [segment.kind for segment in chat.prompt if segment.kind in ("image", "video")]
    if media != ["video"]:
        raise ApiError(400, "video: give one video, as video_url or input_video", param="video")
    if body.stream:
        reply = ChatReply.of(chat)
        begin = {"object": "keye.ground.chunk", "model": context.name_of(chat.request.adapter)}
        encode = keye_encoder(reply, begin, lambda finished: _ground_object(context, chat, reply, finished))
        return await stream_events(request, encode_events(context, (chat.request, encode)), at_once=True)
    replies, finished = await collect_chat(request, chat)
    return JSONResponse(_ground_object(context, chat, replies[0], finished))


def _ground_object(context: Context, chat: PreparedChat, reply: ChatReply, finished: Finished) -> dict[str, Any]:
    fields = keye_fields(finished, reply.text, chat, merged=True)
    return {
        "object": "keye.ground", "model": context.name_of(chat.request.adapter), "intervals": fields["intervals"],
        "text": reply.text,
        "usage": usage_of(finished, [reply], chat), "keye": fields,
    }  # fmt: skip


@router.post("/v1/clips", response_class=FileResponse)
async def clips(request: Request, body: ClipsRequest) -> FileResponse:
    """One interval as an MP4 file, several as a ZIP of them."""
    context = context_of(request)
    seconds = sum(max(0.0, end - start) for start, end in body.intervals)
    if seconds > context.settings.clip_seconds:
        raise ApiError(
            400, f"the clips are longer than {context.settings.clip_seconds:g} s together", param="intervals"
        )
    if any(start > end for start, end in body.intervals):
        raise ApiError(400, "an interval ends before it starts", param="intervals")
    opener = context.opener(owner_of(request))
    if is_stored(body.file_id) and opener.kind(body.file_id) != "video":
        raise ApiError(400, "file_id is an image; clips are cut from videos", param="file_id")
    source = await context.in_thread(opener.open_stored, body.file_id)
    folder, cancelled = Path(tempfile.mkdtemp(prefix="clips-", dir=context.files.folder)), threading.Event()
    try:
        settings = media_options("video", body.preprocess_kwargs or {})
        cutting = context.decode(_cut, source, body.intervals, settings, folder, Path(source.name).stem, cancelled)
        path = await cancel_on_disconnect(request, cutting)
    except BaseException:
        cancelled.set()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    kind = "video/mp4" if path.suffix == ".mp4" else "application/zip"
    cleanup = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
    return FileResponse(path, media_type=kind, filename=path.name, background=cleanup)


def _cut(
    source: Source,
    intervals: Sequence[Sequence[float]],
    options: MediaOptions,
    folder: Path,
    stem: str,
    cancelled: threading.Event,
) -> Path:

    def progress(done: int, total: int) -> None:
        if cancelled.is_set():
            raise Cancelled("the client has disconnected")

    pairs = [(float(start), float(end)) for start, end in intervals]
    clips = cut_clips(source, pairs, folder, options=options, progress=progress)
    if not clips:
        raise ApiError(400, "all intervals are outside the frames of the video", param="intervals")
    named = [path.rename(folder / f"{stem}-{path.name.split('-', 1)[1]}") for path in clips]
    if len(named) == 1:
        return named[0]
    archive = folder / f"{stem}-clips.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as bundle:
        for path in named:
            bundle.write(path, path.name)
    return archive


@router.post("/v1/live")
async def create(request: Request, body: LiveRequest) -> JSONResponse:
    """Opens a session. `keep` "recent" forgets the oldest frames when the context is full."""
    context, owner = context_of(request), owner_of(request)
    context.check_model(body.model)
    own = {"keep": body.keep, "adapter": context.adapter_name(body.model)}
    options = {**(body.preprocess_kwargs or {}), **own}
    name = await context.live.open(owner, lambda: context.model.live(**options))
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
    model = context.name_of(question.adapter)
    collector = Collector(question, model)
    if not body.stream:
        await cancel_on_disconnect(request, collect(context, question, [Continuation()], collector.take))
        return JSONResponse(_answer_object(collector))
    begin = {"object": "keye.live.answer.chunk", "model": model}
    encode_piece = keye_encoder(ChatReply(ReplyStream()), begin, lambda _: _answer_object(collector))

    def encode(event: Event) -> Iterable[bytes]:
        collector.take(event)
        return encode_piece(event)

    return await stream_events(request, encode_events(context, (question, encode)), at_once=True)


async def _generation_request(context: Context, owner: str, session_id: str, body: LiveAsk) -> GenerationRequest:
    options = {name: getattr(body, name) for name in ("max_tokens", "temperature", "seed", "evidence")}
    request = await context.live.work(session_id, owner, lambda live: live.request(body.question, **options))
    return replace(request, salt=context.salt(owner), seconds=context.settings.request_seconds)


def _answer_object(collector: Collector) -> dict[str, Any]:
    assert collector.answer is not None
    return {"object": "keye.live.answer", **collector.answer.to_dict()}


@router.delete("/v1/live/{session_id}")
async def end(request: Request, session_id: str) -> JSONResponse:
    """Ends a session."""
    context_of(request).live.end(session_id, owner_of(request))
    return JSONResponse({"id": session_id, "object": "keye.live", "deleted": True})
