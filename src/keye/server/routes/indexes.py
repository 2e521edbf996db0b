"""/v1/indexes: a video computed once, so that questions about it start at once. An index is named like a file."""

from __future__ import annotations

import secrets
import threading
import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from keye.engine.request import Progress
from keye.errors import KeyeError
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.openai.http import JsonRoute, cancel_on_disconnect
from keye.server.openai.schemas import IndexRequest
from keye.server.uploads import INDEX, StoredFile

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/indexes")
async def create(request: Request, body: IndexRequest) -> JSONResponse:
    """Computes the KV state of an uploaded video and keeps it; messages then name the index in place of the video."""
    context = context_of(request)
    context.check_model(body.model)
    file = context.files.get(body.file_id, owner_of(request))
    if file.kind != "video" or file.id.startswith(INDEX):
        raise ApiError(400, "file_id is not a video; indexes are made of videos", param="file_id")
    cancelled = threading.Event()
    try:
        index = await cancel_on_disconnect(request, _in_turn(context, file, body, cancelled))
    except BaseException:
        cancelled.set()
        raise
    return JSONResponse(_index_object(index))


@router.get("/v1/indexes")
async def list_indexes(request: Request) -> JSONResponse:
    """All indexes of this key, the newest first."""
    stored = context_of(request).files.list(owner_of(request), INDEX)
    return JSONResponse({"object": "list", "data": [_index_object(index) for index in stored], "has_more": False})


@router.get("/v1/indexes/{index_id}")
async def get_index(request: Request, index_id: str) -> JSONResponse:
    """One index."""
    return JSONResponse(_index_object(_index(request, index_id)))


@router.delete("/v1/indexes/{index_id}")
async def delete_index(request: Request, index_id: str) -> JSONResponse:
    """Removes an index; requests that use it already go on."""
    context, index = context_of(request), _index(request, index_id)
    await context.in_thread(context.files.delete, index.id, index.owner)
    return JSONResponse({"id": index.id, "object": "keye.index", "deleted": True})


def _index_object(index: StoredFile) -> dict[str, object]:
    """The index object of the API."""
    return {
        "id": index.id, "object": "keye.index", "bytes": index.size, "created_at": int(index.created),
        "filename": index.name, "keye": dict(index.facts),
    }  # fmt: skip


def _index(request: Request, index_id: str) -> StoredFile:
    if not index_id.startswith(INDEX):
        raise ApiError(404, "no index has this id; make one at /v1/indexes", param="index_id", code="not_found")
    return context_of(request).files.get(index_id, owner_of(request))


class _Cancelled(KeyeError):
    """The client has disconnected."""


async def _in_turn(context: Context, file: StoredFile, body: IndexRequest, cancelled: threading.Event) -> StoredFile:
    """Waits in the event loop, not in one of the few threads."""
    async with context.indexing:
        return await context.in_thread(_build, context, file, body, cancelled)


def _build(context: Context, file: StoredFile, body: IndexRequest, cancelled: threading.Event) -> StoredFile:
    """Computes and keeps an index. Blocks for as long as the video takes, beside other requests."""
    store, path = context.files, context.files.folder / secrets.token_hex(16)

    def check_connected(_: Progress | None = None) -> None:
        if cancelled.is_set():
            raise _Cancelled("the client has disconnected")

    store.check_room(file.owner)
    try:
        info = context.model.index(
            file.source(), path, media_options=body.preprocess_kwargs or {}, seconds=context.settings.request_seconds,
            on_progress=check_connected,
        )  # fmt: skip
        facts = {
            "kind": "video", "file_id": file.id, "tokens": info.tokens, "frames": info.plan["frames"], "kv": info.kv,
            "seconds": round(sum(info.seconds.values()), 3),
        }  # fmt: skip
        index = StoredFile(INDEX + secrets.token_hex(16), file.owner, file.name, info.bytes, time.time(), path, facts)
        check_connected()
        store.keep(index)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return index
