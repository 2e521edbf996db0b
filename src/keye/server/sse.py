"""Server-sent events: a stream that begins early enough for clients, says that it lives, and ends when nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from itertools import takewhile
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from keye.server.errors import ApiError, error_body, of_exception

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
#: Events that are read before they can be sent.
_AHEAD = 64
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
    """An async generator, read ahead a little by a task of its own, that can be waited for with a time limit."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        self._items: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(_AHEAD)
        self._reading: asyncio.Task[None] | None = None
        self._found: list[bytes | BaseException | None] = []

    async def peek(self, seconds: float) -> bool:
        """Whether the next item, or the end, is there within `seconds`; raises what the generator raised."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
        if not self._found:
            try:
                async with asyncio.timeout(seconds):
                    self._found.append(await self._items.get())
            except TimeoutError:
                return False
        if isinstance(error := self._found[0], BaseException):
            raise error
        return True

    def take(self) -> bytes | None:
        """The items that are there, at least the one that `peek` has found, as one; None at the end."""
        while not self._items.empty():
            self._found.append(self._items.get_nowait())
        taken = list(takewhile(lambda item: isinstance(item, bytes), self._found))
        del self._found[: len(taken)]
        return b"".join(taken) if taken else None  # type: ignore[arg-type]

    async def close(self) -> None:
        """Ends the generator at whatever it is doing."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        async with aclosing(self._events):
            pass

    async def _read(self) -> None:
        try:
            async for item in self._events:
                await self._items.put(item)
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            await self._items.put(error)
        else:
            await self._items.put(None)
