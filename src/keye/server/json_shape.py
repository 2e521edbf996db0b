"""Whether a JSON body has a shape that is safe to parse, seen from its bytes before any parser walks into it.

Parsers recurse with depth and allocate with counts, and they differ about what is not quite JSON. So depth, counts and
the length of numbers are bounded by searches that never recurse, and what parsers read differently is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from keye.errors import KeyeError
from keye.server.limits import Limits

#: What stands for an escaped backslash while quotes and surrogates are looked for: as long, and neither of them.
_STAND_IN = b"__"
_BRACKET = re.compile(rb"[][{}]")
_NOT_JSON = re.compile(rb"NaN|Infinity")
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))


class BadJson(KeyeError):
    """A body that is no JSON that can be read, or more of it than is allowed."""


def check_json(body: bytes, limits: Limits) -> None:
    """Raises `BadJson` unless `body` is one JSON value within `limits`, in UTF-8, with no key given twice, no number
    that JSON lacks and no half of a surrogate pair. Time is linear in the body's length."""
    if not body.isascii():
        try:
            body.decode("utf-8")
        except UnicodeDecodeError:
            raise BadJson("the body is not UTF-8; send JSON in UTF-8") from None
    if b"\0" in body or body.startswith(b"\xef\xbb\xbf"):
        raise BadJson("the body is no JSON in UTF-8 without a byte order mark")
    if b"\\" in body:
        body_without = body.replace(b"\\\\", _STAND_IN)
        if _LONE_SURROGATE.search(body_without):
            raise BadJson("the body has half of a surrogate pair; send whole characters")
    else:
        body_without = body
    _check_counts(_without_strings(body_without.replace(b'\\"', _STAND_IN), limits), limits)
    _parse(body)


def _without_strings(body: bytes, limits: Limits) -> bytes:
    """The body with each string reduced to its two quotes; no quote in it is escaped."""
    most = 2 * (limits.json_values + limits.json_keys)
    if body.count(b'"') > most:
        raise BadJson(f"the body has more than {most // 2:,} strings")
    pieces: list[bytes] = []
    at = 0
    while (begin := body.find(b'"', at)) >= 0:
        end = body.find(b'"', begin + 1)
        if end < 0:
            raise BadJson("the body is no valid JSON: a string does not end")
        pieces.append(body[at : begin + 1])
        pieces.append(b'"')
        at = end + 1
    pieces.append(body[at:])
    return b"".join(pieces)


def _check_counts(skeleton: bytes, limits: Limits) -> None:
    """Counts what stands outside of strings."""
    if skeleton.count(b":") > limits.json_keys:
        raise BadJson(f"the body has more than {limits.json_keys:,} keys")
    containers = skeleton.count(b"[") + skeleton.count(b"{")
    if skeleton.count(b",") + containers > limits.json_values:
        raise BadJson(f"the body has more than {limits.json_values:,} values")
    if re.search(rb"[-+.0-9eE]{%d}" % (limits.number_digits + 1), skeleton):
        raise BadJson(f"the body has a number of more than {limits.number_digits} digits")
    if _NOT_JSON.search(skeleton):
        raise BadJson("the body has NaN or Infinity, which JSON does not know; send null or leave the field out")
    depth = 0
    for match in _BRACKET.finditer(skeleton):
        depth += 1 if match[0] in (b"[", b"{") else -1
        if depth > limits.json_depth:
            raise BadJson(f"the body is nested deeper than {limits.json_depth} levels")


def _parse(body: bytes) -> None:
    try:
        json.loads(
            body.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite
        )
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadJson(f"the body is no valid JSON{where}; send one JSON object") from None


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadJson("the body gives a key twice in one object; give it once")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadJson(f"the body has the number {text}, which is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise BadJson(f"the body has {name}, which JSON does not know")
