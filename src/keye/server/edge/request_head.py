"""Checks on the head of a request, and headers that are added to answers. Pure functions; what is not allowed is raised
as `ApiError`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keye.server.edge.errors import ApiError
from keye.server.edge.limits import Limits

#: What a browser may do with the page: run and show only what this server sends.
PAGE_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: What it may do with everything else, such as an uploaded file that is opened by its address: nothing.
DATA_CSP: Final = "default-src 'none'; sandbox; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
METHODS: Final = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")

#: Headers that may stand once only: programs differ on which of two counts.
_ONCE: Final = (b"host", b"authorization", b"x-api-key", b"origin", b"content-length", b"content-type")
_PLAIN_PATH: Final = re.compile(r"/(?:[A-Za-z0-9_~:@!$&'()*+,;=.-]+(?:/[A-Za-z0-9_~:@!$&'()*+,;=.-]+)*/?)?")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_HEADER_LIST: Final = re.compile(r"[A-Za-z0-9, -]{0,1024}")


@dataclass(frozen=True)
class Head:
    """The head of a request, checked. `length` is the declared length of the body, None for one in chunks."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    length: int | None

    @property
    def has_body(self) -> bool:
        return self.length != 0

    @property
    def credentials(self) -> bytes | None:
        """The key as in an Authorization header; Anthropic's clients send it as `x-api-key`."""
        authorization = self.headers.get(b"authorization")
        if authorization is None and (key := self.headers.get(b"x-api-key")) is not None:
            return b"Bearer " + key
        return authorization

    @property
    def media_type(self) -> str:
        return self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()


def read_head(scope: dict[str, Any], limits: Limits) -> Head:
    """The head of an ASGI request. Raises `ApiError` where it is too large, ambiguous, or in no form that is served."""
    path, raw = scope["path"], scope.get("raw_path") or scope["path"].encode()
    if len(raw) > limits.path_bytes or len(scope.get("query_string", b"")) > limits.query_bytes:
        raise ApiError(400, "the address is too long", code="address_too_long")
    if not _PLAIN_PATH.fullmatch(path) or b"%" in raw or any(part in (".", "..") for part in path.split("/")):
        raise ApiError(400, "the address has a path that is not plain; see /openapi.json", code="bad_path")
    method = scope["method"]
    if method not in METHODS:
        raise ApiError(
            405, "this method is not served", code="bad_method", headers=[(b"allow", ", ".join(METHODS).encode())]
        )
    pairs = list(scope["headers"])
    if len(pairs) > limits.header_count or sum(len(name) + len(value) for name, value in pairs) > limits.header_bytes:
        raise ApiError(431, "the request has too many or too long headers", code="headers_too_large")
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        name = name.lower()
        if name in headers and name in _ONCE:
            raise ApiError(400, f"the request has the header {name.decode()} twice", code="repeated_header")
        headers[name] = value
    return Head(method, path, headers, _body_length(method, headers))


def _body_length(method: str, headers: dict[bytes, bytes]) -> int | None:
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "the body is compressed; send it as it is", code="compressed_body")
    declared = headers.get(b"content-length")
    chunked = b"transfer-encoding" in headers
    if chunked and declared is not None:
        raise ApiError(400, "the request declares the length of its body in two ways", code="ambiguous_length")
    if declared is not None and not declared.isdigit():
        raise ApiError(400, "the request's Content-Length is not a number", code="bad_length")
    length = None if chunked else int(declared[:20]) if declared else 0
    if method != "POST" and length != 0:
        raise ApiError(400, f"a {method} request has no body", code="unexpected_body")
    return length


def check_host(head: Head, hosts: Sequence[str]) -> None:
    """Only `localhost`, numeric addresses and `hosts` are served: a foreign domain name that resolves to this
    machine is how a web page would reach the server through a local browser (DNS rebinding)."""
    host = head.headers.get(b"host", b"").decode("latin-1")
    match = _HOST.fullmatch(host)
    if match is None:
        raise ApiError(400, "the request needs one Host header with a plain name", code="bad_host")
    name = match[1].lower()
    if name != "localhost" and name not in hosts and not is_ip(name.strip("[]")):
        raise ApiError(403, "this server is not known under the name in the Host header", code="host_not_allowed")


def is_ip(text: str) -> bool:
    """Whether this is a numeric address in its usual form."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, a name or an address."""
    plain = host.strip("[]")
    return host == "localhost" or (is_ip(plain) and ipaddress.ip_address(plain).is_loopback)


def check_origin(head: Head, origins: Sequence[str]) -> str | None:
    """The configured origin of the web page that asks, None for the server's own page and for programs.

    Raises `ApiError` for any other page: without this, any page could make the browser of a user who runs a
    server on their own machine send requests to it.
    """
    origin = head.headers.get(b"origin", b"").decode("latin-1")
    if origin in origins and origin:
        return origin
    own = head.headers.get(b"host", b"").decode("latin-1").lower()
    if origin and origin.lower() not in (f"http://{own}", f"https://{own}"):
        raise ApiError(403, "web pages of this origin may not use this server", code="origin_not_allowed")
    elsewhere = head.headers.get(b"sec-fetch-site", b"") in (b"cross-site", b"same-site")
    arriving = head.headers.get(b"sec-fetch-mode", b"") == b"navigate" and not head.path.startswith("/v1/")
    if elsewhere and not origin and not arriving:
        raise ApiError(403, "other web pages may not use this server", code="origin_not_allowed")
    return None


def cross_origin(origin: str) -> list[tuple[bytes, bytes]]:
    """Headers that let a configured page read the answer."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"x-request-id, retry-after"),
        (b"vary", b"Origin"),
    ]


def preflight(head: Head) -> list[tuple[bytes, bytes]]:
    """Headers of the answer to a browser that asks beforehand what a configured page may send."""
    requested = head.headers.get(b"access-control-request-headers", b"").decode("latin-1")
    allowed = requested if _HEADER_LIST.fullmatch(requested) else "authorization, content-type"
    return [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", allowed.encode()),
        (b"access-control-max-age", b"600"),
    ]


def secured(headers: Iterable[tuple[bytes, bytes]], *, page: bool, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer with those that protect its reader, and without names of software."""
    added = {
        b"content-security-policy": (PAGE_CSP if page else DATA_CSP).encode(), b"x-content-type-options": b"nosniff",
        b"x-frame-options": b"DENY", b"referrer-policy": b"no-referrer", b"cross-origin-opener-policy": b"same-origin",
        b"cross-origin-resource-policy": b"same-origin",
        b"permissions-policy": b"camera=(), microphone=(), geolocation=()", b"x-request-id": request_id.encode(),
    }  # fmt: skip
    dropped = (*added, b"server", b"x-powered-by")
    kept_headers = [(name.lower(), value) for name, value in headers if name.lower() not in dropped]
    if not any(name == b"cache-control" for name, _ in kept_headers):
        kept_headers.append((b"cache-control", b"no-cache" if page else b"no-store"))
    return [*kept_headers, *added.items()]
