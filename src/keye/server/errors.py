"""Errors as OpenAI clients read them: `{"error": {"message", "type", "param", "code"}}`. A bug of ours shows nothing of
itself but a number under which it is in the log."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from keye.engine.async_engine import Overloaded, Stopping
from keye.errors import ContextError, KeyeError, Option
from keye.server.edge.dialect import prompt_field, translate_error
from keye.server.validation import describe

log: Final = logging.getLogger("keye.server")

_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
#: The field that a sentence begins with, such as `messages[0].content[1]` or `top_p`.
_FIELD: Final = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\]|\.[a-z_]+)*)(?=[ :.])")
#: Fields that are one plain word; others are told from words of a sentence by what is in them.
_WORDS: Final = frozenset({
    "messages", "prompt", "input", "content", "tools", "model", "stop", "n", "seed", "temperature", "echo", "logprobs",
    "fps", "nframes", "timestamps", "intervals", "offset", "question", "event", "video", "frames", "file", "purpose",
    "keep", "attention", "regex", "grammar", "ebnf", "choice", "text", "limit", "track", "deinterlace",
})  # fmt: skip
_MAX_MESSAGE: Final = 2_000


class ApiError(Exception):
    """An answer with an error: a sentence, and the field of the request it is about."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def response(self, path: str = "") -> JSONResponse:
        """The answer to a client of `path`."""
        headers = None if self.retry is None else {"Retry-After": str(self.retry)}
        return JSONResponse(self.body(path), self.status, headers)

    def body(self, path: str = "") -> dict[str, Any]:
        """The error object that clients of `path` read."""
        return translate_error(path, self.status, error_body(self.status, self.message, self.param, self.code))


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that clients read; text that is no Unicode is made readable."""
    readable = message[:_MAX_MESSAGE].encode("utf-8", "replace").decode()
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": readable, "type": kind, "param": param, "code": code}}


def spelled(option: Option) -> str:
    """An option that a sentence names, as a field of JSON."""
    return option.name if option.value is None else f'"{option.name}": {option.value}'


def of_mistake(error: KeyeError, param: str | None = None) -> ApiError:
    """The answer to a user's mistake, with the field that its sentence begins with or names."""
    sentence = error.worded(spelled)
    found = _FIELD.match(sentence)
    if param is None and found and (found[1] in _WORDS or any(mark in found[1] for mark in "_[.")):
        param = found[1]
    if param is None:
        param = next((part.name for part in error.args[1:] if isinstance(part, Option)), None)
    return ApiError(400, sentence, param=param)


def of_bug(error: BaseException) -> ApiError:
    """The answer to a bug of ours, which is logged under a number."""
    number = secrets.token_hex(4)
    log.error("unexpected error %s", number, exc_info=error)
    return ApiError(500, f"the server failed; its log tells more under {number}", code="internal_error")


def of_exception(error: BaseException, *, path: str = "") -> ApiError:
    """The answer to anything that was raised while a request of `path` was served."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Stopping):
        return ApiError(503, str(error), code="server_stopping", retry=2)
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded", retry=1)
    if isinstance(error, ContextError):
        return ApiError(400, error.worded(spelled), param=prompt_field(path), code="context_length_exceeded")
    if isinstance(error, KeyeError):
        return of_mistake(error, prompt_field(path) if str(error).startswith("the prompt ") else None)
    return of_bug(error)


def _json_fault(told: str) -> str:
    """A sentence for what the parser found."""
    if "recursion limit" in told:
        return "the body is nested too deeply; send fewer levels"
    if "surrogate" in told or "end of hex escape" in told:
        return "the body has half of a surrogate pair; send whole characters"
    return "the body is no valid JSON; send one JSON object"


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What a schema found wrong with the first field that is."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, _json_fault(str(errors[0].get("ctx", {}).get("error"))), code="invalid_json")
    param, sentence, unknown = describe(errors)
    if unknown:
        return ApiError(400, f"{param} is no field that keye knows; leave it out", param=param, code="unknown_field")
    if param is None and errors[0]["type"] in ("missing", "dict_type", "model_type", "model_attributes_type"):
        sentence = "the body must be a JSON object; send one"
    return ApiError(400, f"{param}: {sentence}" if param else sentence, param=param)


def install(app: FastAPI) -> None:
    """Every way in which a request can fail gives an error object."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.url.path)

    @app.exception_handler(KeyeError)
    async def mistake(request: Request, error: KeyeError) -> JSONResponse:
        return of_exception(error, path=request.url.path).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: "there is nothing at this address; see /openapi.json", 405: "this address has other methods"}
        answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
        response = answer.response(request.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return of_bug(error).response(request.url.path)
