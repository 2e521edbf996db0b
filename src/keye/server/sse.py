"""Server-sent events: a stream that begins early enough for clients, says that it lives, and ends when nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from keye.server.errors import ApiError, error_body, of_exception

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_ALIVE = b": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
#: Status of an answer that nobody is there to read (as nginx logs it).
CLIENT_GONE = 499


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
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
    request: Request, events: AsyncGenerator[bytes, None], *, alive: float, tail: bytes = DONE, at_once: bool = False
) -> StreamingResponse:
    """A response of `events`. What fails before the first event, or within `alive` seconds, is an answer with an error
    status; later it is an event. Unless `at_once`, the response begins with the first event."""
    source = _Pulled(events)
    if not at_once:
        try:
            await until_gone(request, source.peek(alive))
        except BaseException:
            await source.close()
            raise
    return StreamingResponse(_body(source, alive, tail), media_type="text/event-stream", headers=_HEADERS)


async def _body(source: _Pulled, alive: float, tail: bytes) -> AsyncIterator[bytes]:
    try:
        while True:
            if not await source.peek(alive):
                yield _ALIVE
                continue
            piece = source.take()
            if piece is None:
                break
            yield piece
    except Exception as error:  # noqa: BLE001 - the response has begun: an error can only be an event now
        told = of_exception(error)
        yield event(error_body(told.status, told.message, told.param, told.code))
    finally:
        await source.close()
    yield tail


class _Pulled:
    """An async generator that can be waited for with a time limit without losing its next item."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self._next: asyncio.Task[bytes | None] | None = None

    async def peek(self, seconds: float) -> bool:
        """Whether the next item, or the end, is there within `seconds`; raises what the generator raised."""
        if self._next is None:
            self._next = asyncio.ensure_future(_next_or_none(self._events))
        await asyncio.wait((self._next,), timeout=seconds)
        if self._next.done() and (error := self._next.exception()) is not None:
            raise error
        return self._next.done()

    def take(self) -> bytes | None:
        """The item that `peek` has found; None at the end."""
        assert self._next is not None
        item, self._next = self._next.result(), None
        return item

    async def close(self) -> None:
        """Ends the generator at whatever it is doing."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        async with aclosing(self._events):
            pass


async def _next_or_none(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)
