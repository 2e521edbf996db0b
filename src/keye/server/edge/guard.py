"""The edge of the server: ASGI middleware that rejects requests before they reach the application. No framework.

It knows heads, bodies, keys and rates, and nothing of models or routes beyond a few paths. Each path needs a key except
the page's own files and the health check. Checked in this order: form of the head, Host, Origin, key, rate, number of
running requests, length and arrival of the body, shape of the JSON.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from keye.server.edge.audit import CURRENT, Audit, Record, new_id
from keye.server.edge.errors import ApiError, Headers
from keye.server.edge.json_shape import BadJson, check_json
from keye.server.edge.keys import Keyring
from keye.server.edge.limits import Buckets, Limits, Running, client_of
from keye.server.edge.request_head import Head, check_host, check_origin, cross_origin, preflight, read_head, secured

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Bodies beyond this many bytes are checked in a thread, so that the event loop can serve others.
_LOOP_BYTES = 64 * 1024
_UPLOADS = ("/v1/files",)
#: Health checks; they need no key.
_HEALTH = ("/health", "/ping")


@dataclass(frozen=True)
class GuardSettings:
    """What the guard allows. `hosts` are names of this server besides `localhost` and numeric addresses,
    in lower case; `origins` are web pages elsewhere that may use it, such as `https://app.example`."""

    keys: Keyring = field(default_factory=Keyring)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


class Guard:
    """ASGI middleware around `app`. Per request it sets `scope["keye.key"]` to the name of the key ("local" without
    keys) and `scope["keye.request"]` to the audit `Record`, in which the application counts tokens. `running`
    counts the requests being served, `buffered_bytes` what their bodies take."""

    def __init__(
        self,
        app: Any,
        settings: GuardSettings,
        *,
        audit: Audit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self._settings, self._audit, self._clock = app, settings, audit, clock
        limits = settings.limits
        self._buckets = Buckets(limits.requests_per_second, limits.burst, limits.tracked, clock)
        self._attempts = Buckets(limits.requests_per_second, limits.burst, limits.tracked, clock)
        self.running = Running(limits)
        self.buffered_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        begin = self._clock()
        client = scope.get("client")
        record = Record(
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            new_id("req-"),
            address=client_of(client[0] if client else None),
            method=scope["method"][:16],
            path=scope["path"],
        )
        exchange = Exchange(receive, send, self._settings.limits, record, self._clock, page=_is_page(scope["path"]))
        try:
            await self._admit(scope, exchange)
            exchange.check_rejected()
        except ApiError as error:
            if not exchange.started:
                await exchange.reject(error)
        except ConnectionError:
            record.code = "client_gone"
        finally:
            record.seconds = self._clock() - begin
            if self._audit is not None:
                self._audit.log(record)

    async def _admit(self, scope: MutableMapping[str, Any], exchange: Exchange) -> None:
        record = exchange.record
        head = read_head(dict(scope), self._settings.limits)
        check_host(head, self._settings.hosts)
        exchange.origin = check_origin(head, self._settings.origins)
        if exchange.origin and head.method == "OPTIONS" and b"access-control-request-method" in head.headers:
            # Browsers send preflight requests without the key; the answer holds configuration only.
            await exchange.answer(204, preflight(head))
            return
        record.key = self._owner(head, record)
        scope["keye.key"], scope["keye.request"] = record.key, record
        CURRENT.set(record)
        if head.path in (*_HEALTH, "/metrics") or _is_page(head.path):
            # Cheap, and answered under any load.
            if head.method not in ("GET", "HEAD"):
                raise ApiError(405, "this address is only read", code="bad_method", headers=[(b"allow", b"GET, HEAD")])
            await self.app(scope, exchange.receive, exchange.send)
            return
        # By key alone: behind a proxy all clients have one address. Attempts without a key count by address.
        if wait := self._buckets.take(record.key):
            raise ApiError(429, "too many requests in a short time; slow down", code="rate_limited", retry=wait)
        if not self.running.enter(record.key):
            raise ApiError(429, "too many requests are running; try again soon", code="too_many_running", retry=1)
        try:
            await self._pass(scope, head, exchange)
        finally:
            self.running.leave(record.key)

    def _owner(self, head: Head, record: Record) -> str:
        if head.path in _HEALTH or _is_page(head.path):
            return ""
        owner = self._settings.keys.owner(head.credentials)
        if owner is None:
            if wait := self._attempts.take(record.address, self._settings.limits.attempt_cost):
                raise ApiError(429, "too many wrong keys from this address", code="too_many_attempts", retry=wait)
            sentence = "the request needs a valid key in the header `Authorization: Bearer KEY`"
            raise ApiError(401, sentence, code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])
        return owner

    async def _pass(self, scope: MutableMapping[str, Any], head: Head, exchange: Exchange) -> None:
        limits = self._settings.limits
        if head.method != "POST" or not head.has_body:
            await self.app(scope, exchange.receive, exchange.send)
        elif head.path in _UPLOADS:
            if head.media_type != "multipart/form-data":
                raise ApiError(415, "this address takes multipart/form-data with a file", code="bad_content_type")
            exchange.expect_body(head, limits.upload_bytes, limits.upload_rate)
            await self.app(scope, exchange.receive, exchange.send)
        else:
            if head.media_type != "application/json":
                raise ApiError(
                    415, "the body must be JSON; send Content-Type: application/json", code="bad_content_type"
                )
            exchange.expect_body(head, limits.json_bytes, limits.json_rate)
            await self._pass_json(scope, exchange)

    async def _pass_json(self, scope: MutableMapping[str, Any], exchange: Exchange) -> None:
        """Reads the body, checks its shape, and replays it to the application from memory."""
        limits, pieces, size = self._settings.limits, list[bytes](), 0
        try:
            while (piece := await exchange.read()) is not None:
                size += len(piece)
                self.buffered_bytes += len(piece)
                pieces.append(piece)
                if self.buffered_bytes > limits.buffered_bytes:
                    raise ApiError(503, "too many large requests at once; try again soon", code="overloaded", retry=2)
            body = b"".join(pieces)
            del pieces, piece
            try:
                if size > _LOOP_BYTES:
                    await asyncio.to_thread(check_json, body, limits)
                else:
                    check_json(body, limits)
            except BadJson as error:
                raise ApiError(400, str(error), code="invalid_json") from None
            exchange.replay(body)
            del body  # from here on only the application holds it
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.buffered_bytes -= size


def _is_page(path: str) -> bool:
    """The page's own files, which need no key."""
    return path == "/" or path.startswith("/static/")


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
