"""/v1/video/export: moments as files for editing programs and for reading."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response

from keye.errors import KeyeError
from keye.exports import Export, ExportOptions, ExportRange, MediaReference, find_format, render
from keye.media.content import probe_cached
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import error_of_mistake
from keye.server.openai.http import JsonRoute, cancel_on_disconnect
from keye.server.openai.media_parts import open_video
from keye.server.openai.video_schemas import ExportRequest
from keye.server.stores import safe_name

router = APIRouter(route_class=JsonRoute)

_ADDRESS: Final = re.compile(r"(?:https?|file)://[!-~]+")


@router.post("/v1/video/export", response_class=Response)
async def export(request: Request, body: ExportRequest) -> Response:
    """Moments of one video or several in a format of editing programs, as subtitles, chapters or a table. What was
    rounded or left out is in the header `Keye-Notes`, a JSON list of sentences."""
    context = context_of(request)
    try:
        chosen = find_format(body.format)
    except KeyeError as error:
        raise error_of_mistake(error, param="format") from None
    rendered = await cancel_on_disconnect(request, context.decode(_export, context, owner_of(request), body))
    title = safe_name(body.title or body.label or "moments")
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(title + chosen.suffix)}",
        "Keye-Notes": json.dumps(rendered.notes), "Keye-Rounding-Ms": str(rendered.rounding_ms),
        "Cache-Control": "private, no-store",
    }  # fmt: skip
    return Response(rendered.data, media_type=chosen.media_type, headers=headers)


def _export(context: Context, owner: str, body: ExportRequest) -> Export:
    media = {name: _reference(context, owner, body, name, part) for name, part in (body.videos or {}).items()}
    single = None if body.video is None else _reference(context, owner, body, "", body.video)
    ranges = [
        ExportRange(item.start, item.end, item.label or body.label, item.probability, item.note, item.file)
        for item in body.moments
    ]
    before, after = body.handles or (0.0, 0.0)
    options = ExportOptions(body.rate, body.start_timecode, (before, after), body.mode)
    return render(ranges, single or media, body.format, options, title=body.title)


def _reference(context: Context, owner: str, body: ExportRequest, name: str, part: dict[str, Any]) -> MediaReference:
    """A video as the file names it: by where the user has it, if that is known, and else by its name."""
    source, options = open_video(part, context.opener(owner))
    info = probe_cached(source, None, context.salt(owner), track=options.track)
    place = (body.paths or {}).get(name)
    return MediaReference.of(info, None if place is None else _address(place), name or source.name)


def _address(place: str) -> str:
    """A path of the user's machine as an address; an address as it is."""
    if _ADDRESS.fullmatch(place):
        return place
    for path in (PurePosixPath(place), PureWindowsPath(place)):
        if path.is_absolute() and place.isprintable():
            return path.as_uri()
    raise ApiError(400, f"paths: {place[:80]!r} is not an absolute path or an address", param="paths")
