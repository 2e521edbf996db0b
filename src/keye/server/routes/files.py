"""/v1/files: uploads, written to disk as they arrive, one with each request. /v1/indexes: a video computed once, so
that questions about it start at once; an index is named like a file."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.openai.http import Cancelled, JsonRoute, cancel_on_disconnect
from keye.server.openai.video_schemas import IndexRequest
from keye.server.stores import INDEX, StoredFile, safe_name

router = APIRouter(route_class=JsonRoute)

_PURPOSES: Final = ("media", "vision", "user_data", "assistants")
_MAX_FIELD: Final = 1024
_MAX_PARTS: Final = 8
_MAX_HEADER: Final = 8192
_CALLBACKS: Final = (
    "on_part_begin", "on_header_field", "on_header_value", "on_header_end", "on_headers_finished", "on_part_data",
    "on_part_end", "on_end",
)  # fmt: skip
_SCHEMA: Final = {
    "type": "object", "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": list(_PURPOSES)},
    },
}  # fmt: skip
_BODY: Final = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCHEMA}}}}


@router.post("/v1/files", openapi_extra=_BODY)
async def upload(request: Request) -> JSONResponse:
    """Keeps a video or an image, so that requests can refer to it by its id."""
    context, owner = context_of(request), owner_of(request)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise ApiError(400, "send the file as multipart/form-data, in a field called file", param="file")
    path = await context.in_thread(context.files.begin, owner)
    try:
        with path.open("wb") as file:
            form = _Form(options[b"boundary"], context, path, file)
            await form.read(request.stream(), context)
        if form.filename is None:
            raise ApiError(400, "the form has no field called file; send the video or image in it", param="file")
        if form.purpose not in _PURPOSES:
            raise ApiError(400, f"purpose must be one of {', '.join(_PURPOSES)}", param="purpose")
        stored = await context.decode(context.files.complete, path, owner, safe_name(form.filename))
    finally:
        await context.in_thread(context.files.drop, path)
    return JSONResponse(stored.to_dict())


@router.get("/v1/files")
async def list_files(request: Request) -> JSONResponse:
    """All uploads of this key, the newest first."""
    files = context_of(request).files.list(owner_of(request))
    return JSONResponse({"object": "list", "data": [file.to_dict() for file in files], "has_more": False})


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str) -> JSONResponse:
    """One upload."""
    return JSONResponse(_file(request, file_id).to_dict())


@router.get("/v1/files/{file_id}/content")
async def get_content(request: Request, file_id: str) -> FileResponse:
    """One upload's bytes, also a range of them."""
    file = _file(request, file_id)
    headers = {"Content-Disposition": "attachment", "Cache-Control": "private, no-store"}
    return FileResponse(file.path, media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> JSONResponse:
    """Removes an upload; requests that read it already go on."""
    context = context_of(request)
    await context.in_thread(context.files.delete, file_id, owner_of(request))
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _file(request: Request, file_id: str) -> StoredFile:
    return context_of(request).files.get(file_id, owner_of(request))


class _Form:
    """Reads a form in which one field is a file; its bytes go to disk, other fields stay short."""

    def __init__(self, boundary: bytes, context: Context, path: Path, file: IO[bytes]) -> None:
        self.filename: str | None = None
        self.purpose = "media"
        self._store, self._path, self._file = context.files, path, file
        self._parts, self._name, self._in_file = 0, "", False
        self._header, self._value, self._headers = b"", b"", dict[str, bytes]()
        self._field, self._waiting = b"", list[bytes]()
        self._complete = False
        callbacks: Any = {name: getattr(self, f"_{name}") for name in _CALLBACKS}
        self._parser = MultipartParser(boundary, callbacks)

    async def read(self, chunks: AsyncIterator[bytes], context: Context) -> None:
        """The whole form; `ApiError` for anything but a form with at most one file within the limits."""
        try:
            async for chunk in chunks:
                self._parser.write(chunk)
                if self._waiting:
                    await context.in_thread(self._write)
            self._parser.finalize()
        except FormParserError:
            raise ApiError(400, "the form cannot be read; send multipart/form-data", param="file") from None
        except ClientDisconnect:
            raise ApiError(400, "the upload was cut off", param="file") from None
        if not self._complete:
            raise ApiError(400, "the form is cut short; send it again", param="file")

    def _write(self) -> None:
        data, self._waiting = b"".join(self._waiting), []
        self._store.grow(self._path, len(data))
        self._file.write(data)

    def _on_part_begin(self) -> None:
        self._parts += 1
        self._headers, self._field = {}, b""
        if self._parts > _MAX_PARTS:
            raise ApiError(400, f"the form has more than {_MAX_PARTS} fields; send file and purpose")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > _MAX_HEADER or len(self._headers) > _MAX_PARTS:
            raise ApiError(400, "the form has too many or too long headers; send file and purpose", param="file")

    def _on_header_end(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = self._name == "file"
        if self._in_file:
            if self.filename is not None:
                raise ApiError(400, "the form has two files; send one for each request", param="file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._waiting.append(bytes(data[start:end]))
            return
        self._field += data[start:end]
        if len(self._field) > _MAX_FIELD:
            raise ApiError(400, "a field of the form is too long; send the file in the field called file", param="file")

    def _on_part_end(self) -> None:
        if not self._in_file and self._name == "purpose":
            self.purpose = self._field.decode("utf-8", "replace")
        elif not self._in_file and not self._name.startswith("expires_after"):
            raise ApiError(400, "the form has a field that keye does not know; send file and purpose")

    def _on_end(self) -> None:
        self._complete = True


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
    return {
        "id": index.id, "object": "keye.index", "bytes": index.size, "created_at": int(index.created),
        "filename": index.name, "keye": dict(index.facts),
    }  # fmt: skip


def _index(request: Request, index_id: str) -> StoredFile:
    if not index_id.startswith(INDEX):
        raise ApiError(404, "no index has this id; make one at /v1/indexes", param="index_id", code="not_found")
    return context_of(request).files.get(index_id, owner_of(request))


async def _in_turn(context: Context, file: StoredFile, body: IndexRequest, cancelled: threading.Event) -> StoredFile:
    """Waits in the event loop, not in one of the few threads."""
    async with context.indexing:
        return await context.in_thread(_build, context, file, body, cancelled)


def _build(context: Context, file: StoredFile, body: IndexRequest, cancelled: threading.Event) -> StoredFile:
    """Computes and keeps an index. Blocks for as long as the video takes, beside other requests."""
    store, path = context.files, context.files.folder / secrets.token_hex(16)

    def check_connected() -> None:
        if cancelled.is_set():
            raise Cancelled("the client has disconnected")

    store.check_room(file.owner)
    try:
        info = context.model.index(
            file.source(), path, media_options=body.preprocess_kwargs or {}, seconds=context.settings.request_seconds,
            check=check_connected, adapter=context.adapter_name(body.model),
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
