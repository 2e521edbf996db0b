"""JSON bodies in, server-sent events out. Bodies of many megabytes, media above all, are never held twice for long;
streams begin early enough for clients, send keep-alives, and end when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json

from keye.errors import KeyeError
from keye.server.edge.errors import ApiError, ends_with_done, error_event
from keye.server.errors import error_of

T = TypeVar("T")
DONE: Final = b"data: [DONE]\n\n"
#: What FastAPI sees of a body that is parsed already: it only asks whether there is one.
_PARSED: Final = b"{}"
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_KEEP_ALIVE: Final = b": keep-alive\n\n"
#: What each event of a response contains once; within a text its quotes would be escaped.
_NUMBER: Final = b'"sequence_number":'
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
#: Status of an answer whose client has disconnected (as nginx logs it).
CLIENT_CLOSED: Final = 499


class Cancelled(KeyeError):
    """The client has disconnected from work in a thread."""


class JsonRequest(Request):
    """A request whose JSON is parsed straight from its bytes, which are then released."""

    async def body(self) -> bytes:
        if not self.headers.get("content-type", "").startswith("application/json"):
            return await super().body()
        if not hasattr(self, "_json"):
            data = await super().body()
            self._body = _PARSED if data else b""
            try:
                self._json = from_json(data, allow_inf_nan=False, cache_strings="keys") if data else None
            except ValueError as error:
                raise json.JSONDecodeError(str(error), "", 0) from None
        return self._body

    async def json(self) -> Any:
        await self.body()
        return self._json


class JsonRoute(APIRoute):
    """The route class of all routers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    body = _to_json(data).encode("utf-8", "replace")
    return b"data: " + body + b"\n\n" if name is None else b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. For use before a response begins."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_CLOSED, "the client has disconnected")
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def stream_events(
    request: Request, events: AsyncGenerator[bytes, None], *, tail: bytes = DONE, at_once: bool = False
) -> StreamingResponse:
    """A response of `events`; an empty one becomes a keep-alive. What fails before the first event is an answer with an
    error status, later it is an event. Unless `at_once`, the response begins with the first event."""
    first = b""
    if not at_once:
        try:
            first = await cancel_on_disconnect(request, anext(events, b""))
        except BaseException:
            await events.aclose()
            raise
    body = _stream_body(first, events, tail, request.url.path)
    return StreamingResponse(body, media_type="text/event-stream", headers=_HEADERS)


async def _stream_body(
    first: bytes, events: AsyncGenerator[bytes, None], tail: bytes, path: str
) -> AsyncIterator[bytes]:
    numbered = 0
    try:
        async with aclosing(events):
            if first:
                numbered += count_numbers(first)
                yield first
            async for piece in events:
                numbered += count_numbers(piece)
                yield piece or _KEEP_ALIVE
    except Exception as error:  # noqa: BLE001 - the response has begun: an error can only be an event now
        yield error_end(path, error_of(error, path=path), numbered)
        return
    yield tail


def count_numbers(piece: bytes) -> int:
    """How many events of a piece are numbered, as those of /v1/responses are."""
    return piece.count(_NUMBER)


def error_end(path: str, error: ApiError, numbered: int) -> bytes:
    """How a stream of this path ends with an error, after `numbered` numbered events."""
    return event(*error_event(path, error, numbered)) + (DONE if ends_with_done(path) else b"")
