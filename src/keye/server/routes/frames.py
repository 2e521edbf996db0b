"""What of a video is shown beside answers: small pictures, and subtitles."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from keye.media.subtitles import Subtitles, list_tracks, load_track, read_text
from keye.media.thumbnails import make_thumbnails
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.openai.http import JsonRoute, cancel_on_disconnect
from keye.server.openai.media_parts import open_video
from keye.server.openai.schemas import FramesRequest, SubtitleChoice, SubtitlesRequest

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
        source, body.times, body.height, options=options, salt=context.salt(owner), cache=context.thumbnails
    )
    data = [
        {"time": picture.time, "timestamp": picture.timestamp, "width": picture.width, "height": picture.height,
         "url": "data:image/jpeg;base64," + base64.b64encode(picture.jpeg).decode()}
        for picture in pictures
    ]  # fmt: skip
    return {"object": "list", "data": data}


@router.post("/v1/video/subtitles")
async def subtitles(request: Request, body: SubtitlesRequest) -> JSONResponse:
    """The text tracks of a video and the lines of one of them, or those of a subtitle file."""
    context = context_of(request)
    if body.video is None and (body.subtitles is None or body.subtitles.text is None):
        raise ApiError(400, "video: it is missing; give it, or the text of a subtitle file", param="video")
    work = context.decode(_subtitles, context, owner_of(request), body)
    return JSONResponse(await cancel_on_disconnect(request, work))


def _subtitles(context: Context, owner: str, body: SubtitlesRequest) -> dict[str, Any]:
    tracks = []
    if body.video is not None:
        source, _ = open_video(body.video, context.opener(owner))
        tracks = list_tracks(source)
    chosen = choose_subtitles(context, owner, body.video, body.subtitles) if tracks or body.subtitles else None
    lines = {"track": None, "lines": [], "notes": []} if chosen is None else chosen.to_dict()
    return {"object": "keye.subtitles", "tracks": [track.to_dict() for track in tracks], **lines}


def choose_subtitles(
    context: Context, owner: str, video: Mapping[str, Any] | None, choice: SubtitleChoice | None
) -> Subtitles | None:
    """The subtitles that a request chooses, by default those that players would show. Blocks."""
    if choice is not None and choice.text is not None:
        return read_text(choice.text, "subtitles.text")
    assert video is not None
    source, _ = open_video(video, context.opener(owner))
    return load_track(source, None if choice is None else choice.track)
