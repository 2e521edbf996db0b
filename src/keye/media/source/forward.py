"""The one connection of a live source: a loopback port whose only client is passed on to one address, and to no other.

The relay that reads the stream may reach nothing but that port. Names are resolved here, once for each connection, and
the address that was checked is the one that is dialled, so that neither a name nor a redirect leads anywhere else.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit, urlunsplit

from keye.errors import MediaError, Option
from keye.media.source.download import is_public, redact_url

#: Ports by scheme; of `rtsps` the connection is encrypted here.
PORTS: Final = {"rtsp": 554, "rtsps": 322}
#: Seconds to dial, and for the relay to come.
DIAL_SECONDS: Final = 10.0
#: Addresses of a name that are dialled one after another, at most.
_MOST_DIALLED: Final = 4
_CHUNK: Final = 1 << 16


@dataclass(frozen=True)
class StreamAddress:
    """An `rtsp` or `rtsps` address that was written plainly. `allow_private` permits addresses that are not public."""

    parts: SplitResult
    allow_private: bool = False

    @classmethod
    def parse(cls, url: str, *, allow_private: bool = False) -> StreamAddress:
        """Raises `MediaError` for anything but rtsp(s)://[user:password@]host[:port]/path."""
        try:
            parts = urlsplit(url)
            is_valid = parts.scheme in PORTS and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            is_valid = False
        if not is_valid or not url.isascii() or not url.isprintable() or " " in url:
            raise MediaError("the address is not valid; write it as rtsp://host/path or rtsps://host/path")
        return cls(parts, allow_private)

    @property
    def name(self) -> str:
        """For people: without user, password and query."""
        return redact_url(urlunsplit(self.parts))

    def through(self, port: int) -> str:
        """The address of the same stream behind a forwarder, with what the server needs to know of the user."""
        user, at, _ = self.parts.netloc.rpartition("@")
        return urlunsplit(("rtsp", f"{user}{at}127.0.0.1:{port}", self.parts.path, self.parts.query, ""))

    def dial(self) -> socket.socket:
        """A connection to the address. Raises `MediaError` where it may not be dialled or does not answer."""
        host, port = self.parts.hostname, self.parts.port or PORTS[self.parts.scheme]
        assert host is not None
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise MediaError(f"{self.name} names an unknown host; check the address") from None
        for *_, address in answers:
            if not self.allow_private and not is_public(str(address[0])):
                raise MediaError("{} leads to the private address {}; give {} if you trust it",
                                 self.name, address[0], Option("allow_private_urls"))  # fmt: skip
        reason = ""
        for *_, address in answers[:_MOST_DIALLED]:
            try:
                connection = socket.create_connection((str(address[0]), port), timeout=DIAL_SECONDS)
                if self.parts.scheme == "rtsps":
                    return ssl.create_default_context().wrap_socket(connection, server_hostname=host)
                return connection
            except (OSError, ValueError) as error:  # ValueError: a name that no certificate can have
                reason = reason or getattr(error, "strerror", None) or str(error) or "no answer"
        raise MediaError(f"{self.name} cannot be reached ({reason})")


class Forwarder:
    """Passes bytes between the first client of loopback `port` and an address that is dialled at once, until one of
    them ends. Use as a context manager."""

    def __init__(self, address: StreamAddress) -> None:
        self._far = address.dial()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self._listener.settimeout(DIAL_SECONDS)
        self.port = int(self._listener.getsockname()[1])
        self._near: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="keye-forward", daemon=True)
        self._thread.start()

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends both connections. May be called more than once."""
        for end in (self._listener, self._near, self._far):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._thread.join(DIAL_SECONDS)  # before they are closed: a selector is not woken by what is closed
        for end in (self._listener, self._near, self._far):
            if end is not None:
                end.close()

    def _run(self) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed meanwhile
            self._near, _ = self._listener.accept()
            self._listener.close()
            self._pump(self._near, self._far)
        for end in (self._near, self._far):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pump(near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in ready.select():
                    source, target = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    events = selectors.EVENT_READ
                    try:
                        while True:
                            source.setblocking(False)
                            data = source.recv(_CHUNK)
                            if not data:
                                return
                            target.settimeout(DIAL_SECONDS)
                            target.sendall(data)
                            # What an encrypted connection has read ahead wakes no selector.
                            if not isinstance(source, ssl.SSLSocket) or not source.pending():
                                break
                    # Encrypted connections also carry what is not for the client, such as tickets of the session.
                    except (BlockingIOError, ssl.SSLWantReadError):
                        pass
                    except ssl.SSLWantWriteError:
                        events |= selectors.EVENT_WRITE
                    if events != key.events:
                        ready.modify(source, events, target)
