"""A stand-in for the application behind the guard: it opens the media of a chat as the server does and counts them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from keye.config import ProcessorConfig
from keye.errors import KeyeError
from keye.media.image import open_frames, plan_image
from keye.media.source.fetch import FetchPolicy
from keye.media.video import DecodeLimits, VideoReader

POLICY = FetchPolicy(list_frames=64)
LIMITS = DecodeLimits(memory_bytes=1 << 30, cpu_seconds=20, wait_seconds=20.0, total_seconds=20.0, frames=100_000,
                      duration=24 * 3600.0)  # fmt: skip
CONFIG = ProcessorConfig()


async def stub_app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """A chat with text, `image_url` and `video_url`; uploads are counted; everything else is a short answer or 404."""
    path, method = scope["path"], scope["method"]
    status, answer = 200, {"path": path, "key": scope.get("keye.key")}
    if path == "/v1/chat/completions" and method == "POST":
        try:
            answer["tokens"] = await asyncio.to_thread(tokens_of, json.loads(await body_of(receive)))
        except KeyeError as error:
            status, answer = 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
    elif path == "/v1/files" and method == "POST":
        answer["bytes"] = len(await body_of(receive))
    elif path not in ("/", "/health", "/ping", "/metrics", "/v1/models", "/static/app.js", "/openapi.json"):
        status, answer = 404, {"error": {"message": "there is nothing at this address"}}
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"server", b"stub/1.0"), (b"x-powered-by", b"stubs")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


async def body_of(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message["body"]
        if not message.get("more_body"):
            return body


def tokens_of(request: dict[str, Any]) -> int:
    """Visual tokens of all media of a request."""
    parts = [part for message in request["messages"] if isinstance(message["content"], list)
             for part in message["content"]]  # fmt: skip
    total = 0
    for part in parts:
        if part["type"] == "image_url":
            total += plan_image(POLICY.fetch(part["image_url"]["url"], "image"), CONFIG).visual_tokens
        elif part["type"] == "video_url":
            total += video_tokens(part["video_url"]["url"])
    return total


def video_tokens(url: object) -> int:
    pictures = POLICY.fetch_list(url)
    if pictures is not None:
        return len(open_frames(pictures))
    with VideoReader(POLICY.fetch(url), LIMITS) as reader:
        return reader.plan(CONFIG).visual_tokens
