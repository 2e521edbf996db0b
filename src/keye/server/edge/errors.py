"""Errors as clients read them: `{"error": {"message", "type", "param", "code"}}` in OpenAI's form everywhere, in
Anthropic's below /v1/messages. Knows paths and words, no web framework."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

Headers = Sequence[tuple[bytes, bytes]]

_MESSAGES: Final = "/v1/messages"
_RESPONSES: Final = "/v1/responses"
_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip
_MAX_MESSAGE: Final = 2_000


class ApiError(Exception):
    """A request that gets an error: HTTP status, a sentence, the field it is about, a code for programs, and after how
    many seconds the client may `retry`. `headers` are further ones of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: float | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        wait = () if retry is None else ((b"retry-after", str(max(1, math.ceil(retry))).encode()),)
        self.headers = (*wait, *headers)

    def body(self, path: str = "") -> dict[str, Any]:
        """The error object that clients of `path` read; text that is not Unicode is made readable."""
        message = self.message[:_MAX_MESSAGE].encode("utf-8", "replace").decode()
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": message, "type": _TYPES.get(self.status, default), "param": self.param, "code": self.code,
        }  # fmt: skip
        if not _is_anthropic(path):
            return {"error": error}
        default = "api_error" if self.status >= 500 else "invalid_request_error"
        return {"type": "error", "error": {**error, "type": _ANTHROPIC_TYPES.get(self.status, default)}}


def _is_anthropic(path: str) -> bool:
    return path == _MESSAGES or path.startswith(f"{_MESSAGES}/")


def prompt_field(path: str) -> str:
    """The field in which a request of this path has its prompt."""
    if path.startswith(_RESPONSES):
        return "input"
    return "prompt" if path == "/v1/completions" else "text" if path == "/generate" else "messages"


def ends_with_done(path: str) -> bool:
    """Whether streams of this path end with `[DONE]`."""
    return not (_is_anthropic(path) or path.startswith(_RESPONSES))


def error_event(path: str, error: ApiError, number: int) -> tuple[Mapping[str, Any], str | None]:
    """The data and the name of the event that ends a stream of this path with an error; `number` is that of the event
    where events are numbered."""
    body = error.body(path)
    if path.startswith(_RESPONSES):
        fields = {name: body["error"][name] for name in ("code", "message", "param")}
        return {"type": "error", **fields, "sequence_number": number}, "error"
    return body, "error" if _is_anthropic(path) else None
