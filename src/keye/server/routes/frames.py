"""What of a video is shown beside answers: small pictures, scenes and subtitles."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.media.scenes import find_scenes
from keye.media.subtitles import Subtitles, list_tracks, load_track, read_text
from keye.media.thumbnails import make_thumbnails
from keye.moments import FindProgress
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.openai.http import Cancelled, JsonRoute, cancel_on_disconnect, event, stream_events
from keye.server.openai.media_parts import named_video, open_video
from keye.server.openai.video_schemas import FramesRequest, ScenesRequest, SubtitleChoice, SubtitlesRequest
from keye.server.searches import STARTED, Emit, Job, Jobs

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/video/frames")
async def frames(request: Request, body: FramesRequest) -> JSONResponse:
    """Pictures of a video at given times, as JPEG in data URLs, in the order of the times."""
    context = context_of(request)
    work = context.decode(_frames, context, owner_of(request), body)
    return JSONResponse(await cancel_on_disconnect(request, work), headers={"Cache-Control": "private, no-store"})


def _frames(context: Context, owner: str, body: FramesRequest) -> dict[str, Any]:
    source, options = open_video(body.video, context.opener(owner), body.preprocess_kwargs)
    pictures = make_thumbnails(
        source,
        body.times,
        body.height,
        options=options,
        salt=context.salt(owner),
        cache=context.thumbnails,
        near=body.near,
    )
    data = [
        {"time": picture.time, "timestamp": picture.timestamp, "width": picture.width, "height": picture.height,
         "url": "data:image/jpeg;base64," + base64.b64encode(picture.jpeg).decode()}
        for picture in pictures
    ]  # fmt: skip
    return {"object": "list", "data": data}


@router.post("/v1/video/subtitles")
async def subtitles(request: Request, body: SubtitlesRequest) -> Response:
    """The text tracks of a video and the lines of one of them, of a subtitle file, or of its speech, which may take
    long: with `stream` as server-sent events."""
    context = context_of(request)
    owner = owner_of(request)
    if body.video is None and not (isinstance(body.subtitles, SubtitleChoice) and body.subtitles.text):
        raise ApiError(400, "video: it is missing; give it, or the text of a subtitle file", param="video")
    job = Job(owner, lambda job, emit: emit(_subtitles(context, owner, body, job, emit)))
    if body.stream:
        return await stream_events(request, job_events(context.scans, job, _scan_event))
    if body.subtitles == "speech":
        return JSONResponse(await cancel_on_disconnect(request, last_event(context.scans, job)))
    work = context.decode(_subtitles, context, owner, body, job, lambda _: None)
    return JSONResponse(await cancel_on_disconnect(request, work))


def _subtitles(context: Context, owner: str, body: SubtitlesRequest, job: Job, emit: Emit) -> dict[str, Any]:
    tracks = []
    if body.video is not None:
        source, _ = open_video(body.video, context.opener(owner))
        tracks = list_tracks(source)
    chosen = None
    if tracks or body.subtitles:
        chosen = choose_subtitles(context, owner, body.video, body.subtitles, job, emit)
    lines = {"track": None, "lines": [], "notes": []} if chosen is None else chosen.to_dict()
    return {"object": "keye.subtitles", "tracks": [track.to_dict() for track in tracks], **lines}


def choose_subtitles(
    context: Context, owner: str, video: Mapping[str, Any] | None, choice: SubtitleChoice | str | None, job: Job,
    emit: Emit,
) -> Subtitles | None:  # fmt: skip
    """The subtitles that a request chooses, by default those that players would show. Blocks."""
    if isinstance(choice, SubtitleChoice) and choice.text is not None:
        return read_text(choice.text, "subtitles.text")
    assert video is not None
    source, options = open_video(video, context.opener(owner))
    if not isinstance(choice, str):
        return load_track(source, None if choice is None else choice.track)

    def check() -> None:
        if job.is_stopping:
            raise Cancelled("the transcription was stopped")

    def progress(done: float, total: float) -> None:
        emit(FindProgress("index", done, total, "s"))

    return context.transcripts.get(owner, source, options.track, check, progress)


@router.post("/v1/video/scenes")
async def scenes(request: Request, body: ScenesRequest) -> Response:
    """The hard cuts of a video and the scenes between them; every frame is decoded. With `stream` as server-sent
    events: `progress`, and last the `result`."""
    context, owner = context_of(request), owner_of(request)
    named_video(body.video, context.opener(owner), body.preprocess_kwargs)
    job = Job(owner, lambda job, emit: _scan(context, owner, body, job, emit))
    if body.stream:
        return await stream_events(request, job_events(context.scans, job, _scan_event))
    return JSONResponse(await cancel_on_disconnect(request, last_event(context.scans, job)))


def _scan_event(job: Job, item: FindProgress | Mapping[str, Any]) -> Mapping[str, Any]:
    return item.to_dict() if isinstance(item, FindProgress) else {"type": "result", "result": item}


def _scan(context: Context, owner: str, body: ScenesRequest, job: Job, emit: Emit) -> None:
    source, options = open_video(body.video, context.opener(owner), body.preprocess_kwargs)

    def progress(done: int, total: int) -> None:
        if job.is_stopping:
            raise Cancelled("the scan was stopped")
        emit(FindProgress("index", done, total, "frame"))

    scenes = find_scenes(source, track=options.track, min_length=body.min_length, on_progress=progress)
    shots = [{"start": round(shot.start, 6), "end": round(shot.end, 6)} for shot in scenes.shots]
    emit(
        {"object": "keye.scenes", "start": scenes.start, "end": scenes.end, "cuts": list(scenes.cuts), "scenes": shots}
    )


async def job_events(
    jobs: Jobs, job: Job, encode: Callable[[Job, Any], Mapping[str, Any]]
) -> AsyncGenerator[bytes, None]:
    """A job as server-sent events: `started` with its id, `waiting` until its turn, and its own as `encode` has
    them."""
    async with aclosing(jobs.run(job)) as running:
        async for item in running:
            if item is STARTED:
                yield event({"type": "started", "id": job.id})
            else:
                yield event({"type": "waiting"} if item is None else encode(job, item))


async def last_event(jobs: Jobs, job: Job) -> Any:
    """The last event of a job, its result."""
    result = None
    async with aclosing(jobs.run(job)) as running:
        async for item in running:
            result = item
    return result
