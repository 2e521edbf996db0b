"""From exceptions to the errors that clients get. A defect shows nothing but a number under which it is in the log."""

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
from keye.server.edge.errors import ApiError, prompt_field
from keye.server.validation import describe

log: Final = logging.getLogger("keye.server")

#: The field that a sentence begins with, such as `messages[0].content[1]` or `top_p`.
_FIELD: Final = re.compile(r"([a-z][a-z0-9_]*(?:\[\d+\]|\.[a-z_]+)*)(?=[ :.])")
#: Fields that are one plain word; others have a mark that words of a sentence lack.
_WORDS: Final = frozenset({
    "messages", "prompt", "input", "content", "tools", "model", "stop", "n", "seed", "temperature", "echo", "logprobs",
    "fps", "nframes", "timestamps", "intervals", "offset", "question", "event", "video", "frames", "file", "purpose",
    "keep", "attention", "regex", "grammar", "ebnf", "choice", "text", "limit", "track", "deinterlace",
})  # fmt: skip


def spelled(option: Option) -> str:
    """An option in a sentence, as a field of JSON."""
    return option.name if option.value is None else f'"{option.name}": {option.value}'


def error_of_mistake(error: KeyeError, param: str | None = None) -> ApiError:
    """The answer to a user's mistake, with the field that its sentence begins with or names."""
    sentence = error.worded(spelled)
    match = _FIELD.match(sentence)
    if param is None and match and (match[1] in _WORDS or any(mark in match[1] for mark in "_[.")):
        param = match[1]
    if param is None:
        param = next((part.name for part in error.args[1:] if isinstance(part, Option)), None)
    return ApiError(400, sentence, param=param)


def error_of_defect(error: BaseException) -> ApiError:
    """The answer to a bug of ours, which is logged under a number."""
    number = secrets.token_hex(4)
    log.error("unexpected error %s", number, exc_info=error)
    return ApiError(500, f"the server failed; its log has details under {number}", code="internal_error")


def error_of(error: BaseException, *, path: str = "") -> ApiError:
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
        return error_of_mistake(error, prompt_field(path) if str(error).startswith("the prompt ") else None)
    return error_of_defect(error)


def _json_fault(message: str) -> str:
    """A sentence for what the parser found."""
    if "recursion limit" in message:
        return "the body is nested too deeply; send fewer levels"
    if "surrogate" in message or "end of hex escape" in message:
        return "the body has half of a surrogate pair; send whole characters"
    return "the body is not valid JSON; send one JSON object"


def error_of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What a schema found wrong with the first field that is."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, _json_fault(str(errors[0].get("ctx", {}).get("error"))), code="invalid_json")
    param, sentence, unknown = describe(errors)
    if unknown:
        return ApiError(400, f"{param} is not a field that keye knows; leave it out", param=param, code="unknown_field")
    if param is None and errors[0]["type"] in ("missing", "dict_type", "model_type", "model_attributes_type"):
        sentence = "the body must be a JSON object; send one"
    return ApiError(400, f"{param}: {sentence}" if param else sentence, param=param)


def response_of(error: ApiError, path: str) -> JSONResponse:
    """The answer to a client of `path`."""
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return JSONResponse(error.body(path), error.status, headers)


def install(app: FastAPI) -> None:
    """Makes every way in which a request can fail answer with an error object."""

    @app.exception_handler(ApiError)
    @app.exception_handler(KeyeError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return response_of(error_of(error, path=request.url.path), request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response_of(error_of_validation(error.errors()), request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sentences = {404: "there is nothing at this address; see /openapi.json", 405: "this address has other methods"}
        message = sentences.get(error.status_code, str(error.detail))
        headers = [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
        return response_of(ApiError(error.status_code, message, headers=headers), request.url.path)
