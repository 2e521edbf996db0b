"""Asks an ASGI application without a server: what a client sends, piece by piece, and what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

KEY = "sesame-0123456789-abcdef"
HOST = "127.0.0.1:8000"
T = TypeVar("T")
App = Callable[..., Any]


@dataclass(frozen=True)
class Ask:
    """A request. `body` may come in pieces; `stalls` leaves it unfinished, `leaves` hangs up after it. Headers stand in
    front of the usual ones (Host, key, content type, length), which are left out where `headers` has them."""

    method: str = "GET"
    path: str = "/v1/models"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Sequence[bytes] = b""
    key: str | None = KEY
    query: str = ""
    raw_path: str | None = None
    content_type: str = "application/json"
    length: int | None = None
    chunked: bool = False
    stalls: bool = False
    leaves: bool = False
    client: str = "127.0.0.1"

    @property
    def pieces(self) -> Sequence[bytes]:
        return [self.body] if isinstance(self.body, bytes) else self.body

    def scope(self) -> dict[str, Any]:
        options = {name.lower() for name, _ in self.headers}
        size = sum(map(len, self.pieces))
        usual = [("host", HOST)]
        if self.key is not None:
            usual.append(("authorization", f"Bearer {self.key}"))
        if size or self.length is not None:
            usual.append(("content-type", self.content_type))
            if not self.chunked:
                usual.append(("content-length", str(size if self.length is None else self.length)))
        headers = [*self.headers, *((name, value) for name, value in usual if name not in options)]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": (self.raw_path or self.path).encode(),
            "root_path": "",
            "query_string": self.query.encode(),
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
            "client": (self.client, 50000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }


def post(value: object, path: str = "/v1/chat/completions", **fields: Any) -> Ask:
    """A request with a JSON body."""
    return Ask("POST", path, body=value if isinstance(value, bytes) else json.dumps(value).encode(), **fields)


@dataclass
class Reply:
    """What came back; `headers` by lower-case name."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    finished: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        result: dict[str, Any] = self.json()["error"]
        return result


async def requested(app: App, ask: Ask) -> Reply:
    """Sends the request and waits for the whole answer, or for the application's end."""
    reply, pieces = Reply(), list(ask.pieces)
    scope = ask.scope()
    if ask.chunked:
        scope["headers"].append((b"transfer-encoding", b"chunked"))

    async def receive() -> dict[str, Any]:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or ask.stalls or ask.leaves}
        if ask.stalls or not (ask.leaves or reply.finished):
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")
            reply.finished = not message.get("more_body", False)

    await app(scope, receive, send)
    return reply


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def send(app: App, ask: Ask) -> Reply:
    """One request in an event loop of its own."""
    return run(requested(app, ask))
