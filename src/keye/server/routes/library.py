"""/v1/library: the videos of the operator's folders, what changes of them, and a search in all of them."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from keye.moments import FindProgress
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.library import ServedLibrary
from keye.server.openai.http import JsonRoute, cancel_on_disconnect, event, stream_events
from keye.server.openai.video_schemas import FolderRequest, LibraryFindRequest
from keye.server.routes.frames import job_events, last_event
from keye.server.searches import Emit, Job

router = APIRouter(route_class=JsonRoute)

#: Seconds between two looks for changes.
_POLL_SECONDS: Final = 1.0


def _library(request: Request) -> ServedLibrary:
    library = context_of(request).library
    if library is None:
        raise ApiError(404, "this server has no library; start it with --library", code="no_library")
    return library


def _managed(request: Request) -> ServedLibrary:
    library = _library(request)
    if not library.may_manage:
        raise ApiError(403, "folders of this library are managed where the server runs", code="not_allowed")
    return library


@router.get("/v1/library")
async def describe(request: Request) -> JSONResponse:
    """Folders, videos with their states, and the room that indexes take."""
    library = _library(request)
    return JSONResponse(await context_of(request).in_thread(library.describe))


@router.get("/v1/library/events")
async def events(request: Request) -> Response:
    """All of the library, and again each time that something changes, as server-sent events: first an event `library`,
    then `changed` with the videos that did, the ids of those removed, and the one that is being indexed."""
    return await stream_events(request, _changes(context_of(request), _library(request)))


async def _changes(context: Context, library: ServedLibrary) -> AsyncGenerator[bytes, None]:
    state, quiet = await context.in_thread(library.state), 0.0
    known = await context.in_thread(library.describe)
    yield event({"type": "library", **known})
    videos = {video["id"]: video for video in known["videos"]}
    while not library.is_closing:
        await asyncio.sleep(_POLL_SECONDS)
        quiet += _POLL_SECONDS
        before, state = state, await context.in_thread(library.state)
        if state == before:
            if quiet >= context.settings.keep_alive_seconds:
                yield b""
                quiet = 0.0
            continue
        now = await context.in_thread(library.describe)
        current = {video["id"]: video for video in now["videos"]}
        changed = [video for video in now["videos"] if videos.get(video["id"]) != video]
        removed = [video_id for video_id in videos if video_id not in current]
        rest = {name: value for name, value in now.items() if name not in ("videos", "object")}
        yield event({"type": "changed", "videos": changed, "removed": removed, **rest})
        videos, quiet = current, 0.0


@router.post("/v1/library/folders")
async def add_folder(request: Request, body: FolderRequest) -> JSONResponse:
    """Adds a folder of the server's machine; its videos are indexed where they are."""
    library = _managed(request)
    path = Path(body.path)
    if not path.is_absolute():
        raise ApiError(400, "path: give the full path of a folder", param="path")
    report = await context_of(request).in_thread(lambda: library.catalog.add_folder(path, watch=body.watch))
    library.wake()
    return JSONResponse({"object": "keye.library.folder", "path": str(path), "watch": body.watch,
                         "added": report.added, "problems": list(report.problems)})  # fmt: skip


@router.delete("/v1/library/folders")
async def remove_folder(request: Request, path: str) -> JSONResponse:
    """Forgets a folder and its videos, and deletes their indexes; the videos stay."""
    library = _managed(request)
    freed = await context_of(request).in_thread(library.catalog.remove_folder, Path(path))
    return JSONResponse({"object": "keye.library.folder", "path": path, "deleted": True, "freed_bytes": freed})


@router.post("/v1/library/retry")
async def retry(request: Request) -> JSONResponse:
    """Has videos that could not be read tried again."""
    library = _managed(request)
    count = await context_of(request).in_thread(library.catalog.retry_failed)
    library.wake()
    return JSONResponse({"object": "keye.library", "retried": count})


@router.post("/v1/library/find")
async def find(request: Request, body: LibraryFindRequest) -> Response:
    """Where something happens in all videos of the library that are indexed, the best so far first; events and limits
    as those of /v1/video/find. Moments name their video in `file`."""
    context, owner, library = context_of(request), owner_of(request), _library(request)
    context.check_base(body.model)
    budget = min(body.budget or context.settings.find_tokens, context.settings.find_tokens)

    def work(job: Job, emit: Emit) -> None:
        options = {"top": body.top, "threshold": body.threshold, "budget": budget}
        seconds = context.settings.find_seconds
        for item in library.search(body.event, lambda search: job.on_stop(search.stop), seconds=seconds, **options):
            emit(item)

    job = Job(owner, work)
    if body.stream:
        return await stream_events(request, job_events(context.searches, job, _event_object))
    last = await cancel_on_disconnect(request, last_event(context.searches, job))
    return JSONResponse({"object": "keye.library.find", "id": job.id, "result": last["result"]})


def _event_object(job: Job, item: FindProgress | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(item, FindProgress):
        return item.to_dict()
    return {**item, "id": job.id} if item["type"] == "result" else item


@router.get("/v1/library/{video_id}")
async def video(request: Request, video_id: str) -> JSONResponse:
    """One video."""
    library = _library(request)
    return JSONResponse(
        await context_of(request).in_thread(lambda: library.describe_entries([library.entry(video_id)])[0])
    )


@router.get("/v1/library/{video_id}/content")
async def content(request: Request, video_id: str) -> FileResponse:
    """The bytes of a video, also a range of them, for players."""
    source = await context_of(request).in_thread(_library(request).source, video_id)
    assert source.path is not None
    kind = mimetypes.guess_type(source.name)[0] or ""
    headers = {"Content-Disposition": "attachment", "Cache-Control": "private, no-store"}
    media_type = kind if kind.startswith("video/") else "application/octet-stream"
    return FileResponse(source.path, media_type=media_type, headers=headers)
