"""Whether a JSON body has a shape that is safe to parse, from its bytes and before any parser sees it.

Parsers recurse with depth and allocate with counts, and they differ about what is not quite JSON. So depth, counts and
the length of numbers are bounded by searches that never recurse, and what parsers read differently is rejected.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from keye.errors import KeyeError
from keye.server.edge.limits import Limits
from keye.units import format_bytes

#: What stands for an escaped backslash or quote while quotes and surrogates are looked for: as long, and neither.
_STAND_IN = b"__"
#: How many bytes are searched or replaced at a time.
_PIECE = 1 << 20
#: Longer strings are not searched; the parser of the body checks their characters.
_LONG_STRING = 1 << 16
_BRACKET = re.compile(rb"[][{}]")
_NOT_JSON = re.compile(rb"NaN|Infinity")
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))


class BadJson(KeyeError):
    """A body that is not JSON that can be read, or more of it than is allowed."""


def check_json(body: bytes, limits: Limits) -> None:
    """Raises `BadJson` unless `body` is one JSON value within `limits`, in UTF-8, with no key given twice, no number
    that JSON lacks and no half of a surrogate pair. Time is linear in the body's length, and short where most of it is
    a few long strings, which are not searched."""
    if not body.isascii():
        _check_utf8(body)
    if b"\0" in body or body.startswith(b"\xef\xbb\xbf"):
        raise BadJson("the body is not JSON in UTF-8 without a byte order mark")
    masked: bytes | bytearray = body
    if b"\\" in body:
        masked = bytearray(body)
        for begin, end in _pieces(body):
            masked[begin:end] = body[begin:end].replace(b"\\\\", _STAND_IN).replace(b'\\"', _STAND_IN)
        _check_surrogates(masked)
    skeleton, short = _split_strings(body, masked, limits)
    _check_counts(skeleton, limits)
    _parse(short)


def _check_utf8(body: bytes) -> None:
    """Decodes piece by piece: the whole as text could take four times its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(body), _PIECE):
            decoder.decode(body[at : at + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise BadJson("the body is not UTF-8; send JSON in UTF-8") from None


def _pieces(body: bytes) -> Iterator[tuple[int, int]]:
    """Where pieces of the body begin and end, none within an escape; other threads run between them."""
    at = 0
    while at < len(body):
        end = min(at + _PIECE, len(body))
        escapes = len(body[at:end]) - len(body[at:end].rstrip(b"\\"))
        end = min(end + escapes % 2, len(body))
        yield at, end
        at = end


def _check_surrogates(masked: bytes | bytearray) -> None:
    for at in range(0, len(masked), _PIECE):
        # Twelve bytes more hold a pair that begins at the end; what begins behind it is for the next round.
        for match in _LONE_SURROGATE.finditer(masked, at, at + _PIECE + 12):
            if match.start() < at + _PIECE:
                raise BadJson("the body has half of a surrogate pair; send whole characters")


def _split_strings(body: bytes, masked: bytes | bytearray, limits: Limits) -> tuple[bytes, bytes]:
    """The body with each string reduced to its quotes, and the body with long strings reduced so, as those hold media
    and would keep the interpreter busy. `masked` is the body without escaped quotes, at the same places."""
    most = 2 * (limits.json_values + limits.json_keys)
    if masked.count(b'"') > most:
        raise BadJson(f"the body has more than {most // 2:,} strings")
    skeleton = bytearray()
    short: list[bytes] = []
    at = short_begin = media = 0
    while (begin := masked.find(b'"', at)) >= 0:
        end = masked.find(b'"', begin + 1)
        if end < 0:
            raise BadJson("the body is not valid JSON: a string does not end")
        skeleton += masked[at : begin + 1]
        skeleton += b'"'
        at = end + 1
        if end - begin > _LONG_STRING:
            short.append(body[short_begin : begin + 1])
            short_begin = end
            media += end - begin if _is_media(body, begin) else 0
    if len(body) - media > limits.text_bytes:
        raise BadJson(
            f"the body has more than {format_bytes(limits.text_bytes)} beside its media; send media as data: URLs "
            "or upload them"
        )
    skeleton += masked[at:]
    short.append(body[short_begin:])
    return bytes(skeleton), b"".join(short)


def _is_media(body: bytes, begin: int) -> bool:
    """Whether the long string that begins there is a medium: a data: URL, or base64 under a key for it."""
    if body[begin + 1 : begin + 6].lower() == b"data:":
        return True
    key = body[max(begin - 32, 0) : begin].rstrip(b" \t\r\n:[")
    return key.endswith((b'"data"', b'"file_data"', b'"image_data"', b'"video_data"'))


def _check_counts(skeleton: bytes, limits: Limits) -> None:
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
    except (json.JSONDecodeError, RecursionError):
        raise BadJson("the body is not valid JSON; send one JSON object") from None


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise BadJson("the body gives a key twice in one object; give it once")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadJson(f"the body has the number {text}, which is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise BadJson(f"the body has {name}, which JSON does not know")
