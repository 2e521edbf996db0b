"""From exceptions to the errors that clients get, in sentences of our own, and the notes of one request: what was
tolerated, and which settings were not honoured. A defect shows nothing but a number under which it is in the log."""

from __future__ import annotations

import logging
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from keye.engine.async_engine import Overloaded, Stopping
from keye.errors import ContextError, KeyeError, KeyeWarning, Option
from keye.server.edge.errors import ApiError, prompt_field

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


def error_of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What a schema found wrong with the first field that is."""
    if errors[0]["type"] == "json_invalid":
        fault, sentence = str(errors[0].get("ctx", {}).get("error")), "the body is not valid JSON; send one JSON object"
        if "recursion limit" in fault:
            sentence = "the body is nested too deeply; send fewer levels"
        elif "surrogate" in fault or "end of hex escape" in fault:
            sentence = "the body has half of a surrogate pair; send whole characters"
        return ApiError(400, sentence, code="invalid_json")
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


#: Parts of a place that name a field and not a member of a union; field names are written in small letters.
_FIELD_NAME: Final = re.compile(r"[a-z_][a-z0-9_]*")
_TYPES: Final = frozenset({"str", "int", "float", "bool", "dict", "list", "none", "nullable", "body", "query", "path"})
_WANTED: Final = {
    "string_type": "a text", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "bool_type": "true or false", "list_type": "a list", "dict_type": "an object",
    "model_type": "an object", "model_attributes_type": "an object", "none_required": "null",
}  # fmt: skip
#: Sentences with what the error itself brings.
_SENTENCES: Final = {
    "missing": "it is missing; give it",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be below {lt}",
    "finite_number": "it must be a finite number",
    "literal_error": "it must be one of {expected}",
    "too_long": "it has more than {max_length} entries",
    "too_short": "it has fewer than {min_length} entries",
    "string_too_long": "it has more than {max_length} characters",
    "string_too_short": "it has fewer than {min_length} characters",
    "int_parsing_size": "the number is too large",
}


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str | None, str, bool]:
    """The field at fault, None for the body itself; a sentence about the first thing that is wrong with it; and whether
    it is an unknown field."""
    param = place(errors[0])
    here = [error for error in errors if _is_within(place(error), param)]
    # For a union, an error within the member that fits says more than what the others expect.
    for error in here:
        if error["type"] not in _WANTED:
            return place(error), _sentence(error), error["type"] == "extra_forbidden"
    param = max((place(error) or "" for error in here), key=len) or None
    wanted = dict.fromkeys(_WANTED[error["type"]] for error in here if place(error) == param)
    return param, f"give {' or '.join(wanted)}", False


def place(error: Mapping[str, Any]) -> str | None:
    """Where an error is, such as `messages[0].role`."""
    text = ""
    for part in error.get("loc", ()):
        if isinstance(part, int):
            text += f"[{part}]"
        elif isinstance(part, str) and _FIELD_NAME.fullmatch(part) and part not in _TYPES:
            text += f".{part}"
    return text.lstrip(".") or None


def _is_within(inner: str | None, outer: str | None) -> bool:
    """Whether a place is another one or within it."""
    return inner == outer or (inner or "").startswith((f"{outer}.", f"{outer}["))


def _sentence(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in _WANTED:
        return f"give {_WANTED[kind]}"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    return _SENTENCES.get(kind, "it is not valid").format(**{k: _format(v) for k, v in error.get("ctx", {}).items()})


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


#: Notes of one request.
_MOST: Final = 64
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)
_unknown: ContextVar[set[str] | None] = ContextVar("unknown", default=None)


async def begin_notes() -> None:
    """A new list of notes, in the task that handles a request, before its body is read."""
    _notes.set([])
    _unknown.set(set())


def current_notes() -> list[str]:
    """The list of notes of the current request, which may still grow."""
    notes = _notes.get()
    if notes is None:
        notes = []
        _notes.set(notes)
    return notes


def noted() -> dict[str, Any]:
    """The notes of the current request as a field of its answer; nothing where there are none."""
    return {"keye": {"notes": list(notes)}} if (notes := current_notes()) else {}


def count_unknown(name: str) -> int:
    """How many different unknown names the current request has had, with this one."""
    names = _unknown.get()
    if names is None:
        return 1
    names.add(name)
    return len(names)


def add_note(sentence: str) -> None:
    """Adds to the notes of the current request; no effect outside a request."""
    notes = _notes.get()
    if notes is not None and len(notes) < _MOST and sentence not in notes:
        notes.append(sentence)


def collect_warnings() -> None:
    """From now on, warnings of settings that are not honoured are kept for the request they belong to. For the whole
    process: Python has one place for warnings."""
    warnings.simplefilter("always", KeyeWarning)
    usual = warnings.showwarning

    def keep(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if isinstance(message, KeyeWarning):
            add_note(message.worded(spelled))
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = keep
