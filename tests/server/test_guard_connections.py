"""The guard behind real connections: how long a head may take, and which connections make room."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from keye.server.edge.guard import Guard, GuardSettings
from keye.server.edge.keys import Keyring
from keye.server.edge.limits import Limits
from tests.support.asgi import KEY
from tests.support.stub_app import stub_app


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    """A real server whose connections must send a head at once."""
    uvicorn = pytest.importorskip("uvicorn")
    from keye.server.edge.protocol import uvicorn_options

    limits = Limits(head_seconds=0.2, connections_per_address=50, connections=12, keep_alive_seconds=1)
    app = Guard(stub_app, GuardSettings(keys=Keyring.of({"tests": KEY}), limits=limits))
    config = uvicorn.Config(
        app, port=0, log_level="critical", lifespan="off", timeout_keep_alive=1,
        **uvicorn_options(limits),
    )  # fmt: skip
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join()


def exchange(address: tuple[str, int], data: bytes) -> bytes:
    """What a server answers to these bytes until it hangs up."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            return answer
        return answer


def test_idle_connections_make_room_those_without_a_key_first(address: tuple[str, int]) -> None:
    def connected(key: str | None) -> socket.socket:
        connection = socket.create_connection(address, timeout=30)
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        path = "/v1/models" if key else "/health"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        return connection

    connections = [connected(KEY), *(connected(None) for _ in range(40))]
    try:
        connections[0].sendall(
            f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
        )
        assert connections[0].recv(65536).startswith(b"HTTP/1.1 200"), "the one with a key is kept"
    finally:
        for connection in connections:
            connection.close()


def test_over_a_real_connection(address: tuple[str, int]) -> None:
    head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
    good = exchange(address, head + b"Connection: close\r\n\r\n")
    assert good.startswith(b"HTTP/1.1 200")
    assert b"\r\nserver:" not in good.lower()
    # Half a head, and on a connection that is kept alive half of the next one: both end without an answer to it.
    assert exchange(address, head) == b""
    assert exchange(address, head + b"\r\n" + head).count(b"HTTP/1.1") == 1
    assert exchange(address, head + b"x: " + b"y" * 200_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(address, b"\0\1\2\3\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(address, head.replace(b"GET", b"POST") + b"Content-Length: 9999999999\r\n\r\n"
                    ).startswith(b"HTTP/1.1 415")  # fmt: skip
