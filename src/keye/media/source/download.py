"""Downloads a file over http or https under limits. Used by `fetch` alone; knows no media format.

Every address is resolved once, checked, and dialled as it was checked, for the first URL and for every redirect, so a
name cannot lead into a private network between the check and the connection. Standard library only; no proxy is used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, urljoin, urlsplit

from keye.config.media import FetchLimits
from keye.errors import MediaError
from keye.media.source.hosts import allows_host, check_address
from keye.units import format_bytes

_CHUNK = 1 << 18
#: Bytes that tell an image from a video.
_HEAD = 32
#: How long to wait for bytes beyond the declared length, in seconds: most servers close the connection at once.
_SURPLUS_SECONDS = 0.2
_REDIRECTS = (301, 302, 303, 307, 308)


def download(
    url: str, limits: FetchLimits, max_bytes: int, max_bytes_of: Callable[[bytes], int] | None = None
) -> tuple[IO[bytes], int]:
    """The file behind `url` as a named temporary file, which is removed when it is closed, and its size in bytes.

    `max_bytes_of` tells from the first bytes how large a file of that kind may be, if that is less than `max_bytes`.
    Raises `MediaError` when it cannot be had within the limits.
    """
    most = min(limits.download_bytes, max_bytes)
    expired, end = threading.Event(), time.monotonic() + limits.total_seconds
    for _ in range(limits.redirects + 1):
        parts = _check_url(url, limits)
        with _connect(parts, limits, expired, end - time.monotonic()) as connection:
            # The connection forgets its socket once the head of the response is read.
            dialled = connection.sock
            try:
                location = _open_response(connection, parts)
                if isinstance(location, http.client.HTTPResponse):
                    return _save(location, dialled, parts, most, expired, max_bytes_of, limits.folder)
            except (OSError, http.client.HTTPException) as error:
                raise _explain_failure(parts, error, expired, limits) from None
        url = urljoin(url, location)
    raise MediaError(f"{redact_url(url)} redirects more than {limits.redirects} times; give the final address")


def redact_url(url: str) -> str:
    """An address for people: without its query, which may hold a key, and without a user's name."""
    parts = urlsplit(url)
    text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_url(url: str, limits: FetchLimits) -> SplitResult:
    if limits.hosts is not None:
        check_address(url, limits.hosts)
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise MediaError("the address is not valid; write it as https://host/path") from None
    if parts.scheme not in ("http", "https"):
        raise MediaError(f"{redact_url(url)} is not an http or https address; download the file and pass its path")
    if not valid:
        raise MediaError("the address is not valid; write it as https://host/path")
    if parts.username or parts.password:
        raise MediaError(f"{redact_url(url)} holds a user name; download the file and pass its path")
    return parts


def _resolve_address(parts: SplitResult, limits: FetchLimits) -> tuple[Any, ...]:
    """The socket address to dial: the first that the name resolves to, all of them being allowed."""
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        addresses = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise MediaError(f"{redact_url(parts.geturl())} names an unknown host; check the address") from None
    for *_, address in addresses:
        private = limits.allow_private or allows_host(limits.private_hosts, parts.hostname, port, parts.scheme)
        if not private and not is_public(str(address[0])):
            if limits.hosts is not None:
                raise MediaError(f"{redact_url(parts.geturl())} leads to a private address; send the file itself")
            raise MediaError(
                f"{redact_url(parts.geturl())} leads to the private address {address[0]}; download the file yourself, "
                "or allow private addresses if you trust it"
            )
    return tuple(addresses[0][4])


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it is wrapped in an IPv6 address."""
    ip = ipaddress.ip_address(text.partition("%")[0])
    inner = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        inner = [address for address in wrapped if address is not None] or inner
    return all(address.is_global and not address.is_multicast and not address.is_reserved for address in inner)


@contextmanager
def _connect(
    parts: SplitResult, limits: FetchLimits, expired: threading.Event, seconds: float
) -> Iterator[http.client.HTTPConnection]:
    """An open connection that is cut after `seconds`, whatever the other side sends until then."""
    address = _resolve_address(parts, limits)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, address[1])
    # The connection forgets its socket once the head of the response is read; the response goes on using it.
    live: list[socket.socket] = []

    def cut() -> None:
        expired.set()
        try:
            for open_socket in live[-1:]:
                open_socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # It has ended by itself.

    watch = threading.Timer(max(seconds, 0), cut)
    watch.daemon = True
    watch.start()
    try:
        try:
            connection.sock = socket.create_connection(address[:2], timeout=limits.idle_seconds)
            live.append(connection.sock)
            if parts.scheme == "https":
                # Wrapping takes the socket over, and the handshake comes after, so that `cut` always finds it.
                secure = ssl.create_default_context().wrap_socket(
                    connection.sock, server_hostname=parts.hostname, do_handshake_on_connect=False
                )
                connection.sock = secure
                live.append(secure)
                secure.do_handshake()
        except OSError as error:
            raise _explain_failure(parts, error, expired, limits) from None
        yield connection
    finally:
        watch.cancel()
        connection.close()


def _open_response(connection: http.client.HTTPConnection, parts: SplitResult) -> http.client.HTTPResponse | str:
    """The response with the file, or where it is said to be instead."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if any(ord(letter) <= 32 or ord(letter) > 126 for letter in target):
        raise MediaError(
            f"{redact_url(parts.geturl())} holds blanks or letters that an address must escape; use %20 and the like"
        )
    headers = {"User-Agent": "keye", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    if response.status in _REDIRECTS and (location := response.getheader("Location")):
        return location
    name = redact_url(parts.geturl())
    if response.status != 200:
        # The phrase is the standard's: what a server writes there may be anything.
        phrase = http.client.responses.get(response.status, "an unknown status")
        raise MediaError(f"{name} answers {response.status} {phrase}; check the address")
    # The standard library ignores a length that is not a number.
    length = response.getheader("Content-Length")
    if length is not None and not (length.strip().isascii() and length.strip().isdigit()):
        raise MediaError(f"{name} declares a length of {length[:40]!r} bytes; download it and pass the file")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise MediaError(f"{name} sends the file compressed; download it and pass the file")
    if response.getheader("Content-Type", "").lower().startswith("text/html"):
        raise MediaError(f"{name} is a web page; give the address of the video or image itself")
    return response


def _save(
    response: http.client.HTTPResponse,
    dialled: socket.socket,
    parts: SplitResult,
    most: int,
    expired: threading.Event,
    max_bytes_of: Callable[[bytes], int] | None,
    folder: Path | None,
) -> tuple[IO[bytes], int]:
    """The body, as long as it is declared to be, in a temporary file, and its size."""
    name = redact_url(parts.geturl())
    declared = response.length
    _check_declared(name, declared, most)
    if declared is not None:
        response.length = declared + 1  # Else the response closes before the surplus can be looked for.
    file = tempfile.NamedTemporaryFile(prefix="keye-", dir=folder)  # noqa: SIM115 (the caller keeps it)
    size = 0
    try:
        while size != declared:
            wanted = _CHUNK if size else _HEAD
            chunk = response.read(wanted if declared is None else min(wanted, declared - size))
            if not chunk:
                break
            if size == 0 and max_bytes_of is not None:
                most = min(most, max_bytes_of(chunk))
                _check_declared(name, declared, most)
            size += len(chunk)
            if size > most:
                raise MediaError(
                    f"{name} sends more than the limit of {format_bytes(most)}; "
                    "check that it is a file, not a live stream"
                )
            file.write(chunk)
        if expired.is_set():
            raise TimeoutError
        if declared is not None and size != declared:
            raise MediaError(f"{name} ended after {size} of {declared} bytes; try again")
        surplus = b""
        if response.length is not None:
            with suppress(OSError):  # Silence: a server that keeps the connection open although it was asked not to.
                dialled.settimeout(_SURPLUS_SECONDS)
                surplus = response.read(1)
        if surplus:  # The declared length or the file is wrong.
            raise MediaError(f"{name} sends more than the {size} bytes it declares; download it and pass the file")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file, size


def _check_declared(name: str, declared: int | None, most: int) -> None:
    if declared is not None and declared > most:
        raise MediaError(
            f"{name} has {format_bytes(declared)}, more than the limit of {format_bytes(most)}; "
            "cut it into parts or re-encode it"
        )


def _explain_failure(parts: SplitResult, error: Exception, expired: threading.Event, limits: FetchLimits) -> MediaError:
    name = redact_url(parts.geturl())
    if expired.is_set():
        return MediaError(f"{name} took more than {limits.total_seconds:g} s; download it and pass the file")
    if isinstance(error, TimeoutError):
        return MediaError(
            f"{name} sent nothing for {limits.idle_seconds:g} s; try again or download it and pass the file"
        )
    if isinstance(error, http.client.IncompleteRead):
        return MediaError(f"{name} broke off in the middle; try again")
    if isinstance(error, http.client.HTTPException):
        return MediaError(f"{name} gives no valid HTTP answer; check the address")
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
    return MediaError(f"{name} cannot be fetched ({reason}); check the address and the connection")
