"""One request and its answer between the server's event loop and the application: counted, timed, bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from keye.server.edge.audit import Record
from keye.server.edge.errors import ApiError, Headers
from keye.server.edge.limits import Limits
from keye.server.edge.request_head import Head, cross_origin, secured

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Exchange:
    """`receive` and `send` for the application, in place of the server's own."""

    def __init__(
        self, receive: Receive, send: Send, limits: Limits, record: Record, clock: Callable[[], float], *, page: bool
    ) -> None:
        self._receive, self._send, self._limits, self.record, self._clock = receive, send, limits, record, clock
        self.page = page
        self.origin: str | None = None
        self.started = False
        self._rejection: ApiError | None = None
        self._body: bytes | None = None
        self._ended = True
        self._most, self._rate, self._begin = 0, 1.0, 0.0

    def expect_body(self, head: Head, most: int, rate: float) -> None:
        """Allows a body of at most `most` bytes, at `rate` bytes a second; `ApiError` for one declared longer."""
        if head.length is not None and head.length > most:
            raise self._too_large(most)
        self._ended = not head.has_body
        self._most, self._rate, self._begin = most, rate, self._clock()

    def replay(self, body: bytes) -> None:
        """Makes the application receive this body, which was read already."""
        self._body = body

    async def read(self) -> bytes | None:
        """The next piece of the body, None at its end. Raises `ApiError` where it is too long or too slow, and
        `ConnectionError` where the client has gone."""
        if self._ended:
            return None
        limits, received = self._limits, self.record.bytes_in
        in_time = self._begin + limits.grace_seconds + received / self._rate - self._clock()
        try:
            if in_time <= 0:
                raise TimeoutError
            async with asyncio.timeout(min(limits.idle_seconds, in_time)):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body comes too slowly; send it again", code="slow_body") from None
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        self.record.bytes_in += len(message.get("body", b""))
        if self.record.bytes_in > self._most:
            raise self._too_large(self._most)
        self._ended = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def receive(self) -> Message:
        """ASGI `receive`: the body, then the disconnect. A body that is rejected on its way raises here, and the client
        gets that error whatever the application answers."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        try:
            piece = await self.read()
        except ApiError as error:
            self._rejection = error
            raise
        except ConnectionError:
            return {"type": "http.disconnect"}
        if piece is not None:
            return {"type": "http.request", "body": piece, "more_body": not self._ended}
        return await self._receive()

    async def send(self, message: Message) -> None:
        """ASGI `send`. Raises `TimeoutError` where the client does not read its answer."""
        if self._rejection is not None and not self.started:
            return
        await self._pass(message)

    def check_rejected(self) -> None:
        """Raises the error of a body that the application swallowed."""
        if self._rejection is not None:
            raise self._rejection

    async def reject(self, error: ApiError) -> None:
        """Answers in the application's place and closes the connection: the body may still be on its way."""
        self.record.code = error.code or ""
        body = json.dumps(error.body(self.record.path)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *error.headers]
        await self.answer(error.status, headers, b"" if self.record.method == "HEAD" else body, length=len(body))

    async def answer(self, status: int, headers: Headers, body: bytes = b"", length: int | None = None) -> None:
        """Sends a complete answer."""
        headers = [*headers, (b"content-length", str(len(body) if length is None else length).encode())]
        await self._pass({"type": "http.response.start", "status": status, "headers": headers})
        await self._pass({"type": "http.response.body", "body": body, "more_body": False})

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = secured(message.get("headers", ()), page=self.page, request_id=self.record.request_id)
            headers += cross_origin(self.origin) if self.origin else []
            message = {**message, "headers": headers}
            self.started, self.record.status = True, message["status"]
        self.record.bytes_out += len(message.get("body", b""))
        async with asyncio.timeout(self._limits.send_seconds):
            await self._send(message)

    @staticmethod
    def _too_large(most: int) -> ApiError:
        return ApiError(413, f"the body has more than the limit of {most:,} bytes", code="body_too_large")
