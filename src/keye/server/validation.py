"""What a schema found wrong with a request, in sentences of our own: the words of pydantic are those of a library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

#: Parts of a place that name a field and not a member of a union; field names are written in small letters.
_FIELD: Final = re.compile(r"[a-z_][a-z0-9_]*")
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
        elif isinstance(part, str) and _FIELD.fullmatch(part) and part not in _TYPES:
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
