"""Server-sent events: a stream that begins early enough for clients, says that it lives, and ends when nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from keye.server.edge.errors import ApiError, ends_with_done, error_event
from keye.server.errors import error_of

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_ALIVE = b": keep-alive\n\n"
#: What each event of a response holds once; within a text its quotes would be escaped.
_NUMBER = b'"sequence_number":'
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
#: Status of an answer that nobody is there to read (as nginx logs it).
CLIENT_GONE = 499


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event."""
    body = _to_json(data).encode("utf-8", "replace")
    return b"data: " + body + b"\n\n" if name is None else b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. For use before a response begins."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client has gone")
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def streamed(
    request: Request, events: AsyncGenerator[bytes, None], *, tail: bytes = DONE, at_once: bool = False
) -> StreamingResponse:
    """A response of `events`, of which an empty one says that nothing has come for a while. What fails before the first
    is an answer with an error status; later it is an event. Unless `at_once`, the response begins with the first."""
    first = b""
    if not at_once:
        try:
            first = await until_gone(request, anext(events, b""))
        except BaseException:
            await events.aclose()
            raise
    return StreamingResponse(
        _body(first, events, tail, request.url.path), media_type="text/event-stream", headers=_HEADERS
    )


async def _body(first: bytes, events: AsyncGenerator[bytes, None], tail: bytes, path: str) -> AsyncIterator[bytes]:
    numbered = 0
    try:
        async with aclosing(events):
            if first:
                numbered += count_numbers(first)
                yield first
            async for piece in events:
                numbered += count_numbers(piece)
                yield piece or _ALIVE
    except Exception as error:  # noqa: BLE001 - the response has begun: an error can only be an event now
        yield error_end(path, error_of(error, path=path), numbered)
        return
    yield tail


def count_numbers(piece: bytes) -> int:
    """How many events of a piece have a number, as those of /v1/responses do."""
    return piece.count(_NUMBER)


def error_end(path: str, error: ApiError, numbered: int) -> bytes:
    """How a stream of this path ends with an error, after so many events with a number."""
    last = event(*error_event(path, error, numbered))
    return last + (DONE if ends_with_done(path) else b"")
