"""Errors in the words of the interface that was asked: OpenAI's everywhere, Anthropic's below /v1/messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_ANTHROPIC: Final = "/v1/messages"
_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip


def speaks_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's objects."""
    return path == _ANTHROPIC or path.startswith(f"{_ANTHROPIC}/")


def prompt_field(path: str) -> str:
    """The field in which a request of this path brings its prompt."""
    if path.startswith("/v1/responses"):
        return "input"
    return "prompt" if path == "/v1/completions" else "text" if path == "/generate" else "messages"


def ends_with_done(path: str) -> bool:
    """Whether streams of this path end with `[DONE]`."""
    return not (speaks_anthropic(path) or path.startswith("/v1/responses"))


def error_event(path: str, body: Mapping[str, Any], number: int) -> tuple[Mapping[str, Any], str | None]:
    """The data and the name of the event in which a stream of this path ends with an error; `number` is that of the
    event where they are counted."""
    if speaks_anthropic(path):
        return body, "error"
    if path.startswith("/v1/responses"):
        error = body["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        return {"type": "error", **told, "sequence_number": number}, "error"
    return body, None


def translate_error(path: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """An error object `{"error": {"message", "type", "param", "code"}}` as clients of `path` read it."""
    if not speaks_anthropic(path):
        return dict(body)
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}
