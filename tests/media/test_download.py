"""Files behind http addresses: limits, redirects, private addresses, servers that lie."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keye.config import ProcessorConfig
from keye.config.media import FetchLimits
from keye.errors import MediaError
from keye.media.source.download import is_public, redact_url
from keye.media.source.fetch import fetch_source, media_kind
from keye.media.video import VideoReader
from tests.support.clips import read_code, write_clip

LOCAL = FetchLimits(allow_private=True)
Answer = Callable[[BaseHTTPRequestHandler], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each path with the function that a test has put there."""

    answers: dict[str, Answer]

    def do_GET(self) -> None:
        self.answers[self.path.partition("?")[0]](self)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Answer]]]:
    """The address of a server on this machine and its table of answers."""
    answers: dict[str, Answer] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"answers": answers})) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", answers
        httpd.shutdown()


def body(data: bytes, *, length: int | str | None = None, status: int = 200, **headers: str) -> Answer:
    """Sends `data`, declaring `length` bytes (its own length unless given)."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def redirect(location: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", location)
        request.end_headers()

    return answer


def endless(request: BaseHTTPRequestHandler) -> None:
    """A body without a length that goes on until the other side hangs up."""
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.wfile.write(b"\0" * 65536)
    except OSError:
        return


def test_a_video_by_its_address(server: tuple[str, dict[str, Answer]], tmp_path: Path) -> None:
    address, answers = server
    data = write_clip(tmp_path / "clip.mp4").read_bytes()
    answers["/clip.mp4"] = body(data)
    answers["/moved"] = redirect("/clip.mp4?key=secret")
    source = fetch_source(f"{address}/moved?token=1", limits=LOCAL)
    assert (source.name, source.size, media_kind(source)) == ("moved", len(data), "video")
    with VideoReader(source) as reader:
        assert reader.info.frame_count == 60
        assert read_code(next(iter(reader.frames(reader.plan(ProcessorConfig()))))) == 0
    remaining = source.path
    assert remaining is not None
    assert remaining.exists()
    del source, reader
    gc.collect()
    assert not remaining.exists()


def test_private_addresses_are_refused(server: tuple[str, dict[str, Answer]]) -> None:
    address, answers = server
    answers["/clip.mp4"] = body(b"data")
    for url in (f"{address}/clip.mp4", "http://localhost:1/", "http://[::1]:1/", "http://169.254.169.254/latest"):
        with pytest.raises(MediaError, match="private address"):
            fetch_source(url)


def test_private_hosts_are_those_that_are_named(server: tuple[str, dict[str, Answer]]) -> None:
    address, answers = server
    answers["/clip.mp4"] = body(b"data")
    port = address.rpartition(":")[2]
    rules = (f"127.0.0.1:{port}",)
    limits = FetchLimits(hosts=(*rules, "localhost"), private_hosts=rules)
    assert fetch_source(f"http://127.0.0.1:{port}/clip.mp4", limits=limits).size == 4
    with pytest.raises(MediaError, match="private address"):
        fetch_source("http://localhost/clip.mp4", limits=limits)
    with pytest.raises(MediaError, match="not among those"):
        fetch_source("http://127.0.0.1:1/clip.mp4", limits=limits)


def test_a_redirect_is_checked_like_the_first_address(
    server: tuple[str, dict[str, Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, answers = server
    port = int(address.rpartition(":")[2])
    answers["/away"] = redirect("http://10.0.0.1/clip.mp4")
    answers["/file"] = redirect("file:///etc/passwd")
    # A public name that leads to the server of this test, since no test leaves the machine.
    monkeypatch.setattr("keye.media.source.download.is_public", lambda ip: ip == "127.0.0.1")
    resolve = socket.getaddrinfo

    def resolved(host: str, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "public.example" else host, *arguments, **options)

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    with pytest.raises(MediaError, match=r"leads to the private address 10\.0\.0\.1"):
        fetch_source(f"http://public.example:{port}/away")
    with pytest.raises(MediaError, match="is not an http or https address"):
        fetch_source(f"http://public.example:{port}/file")


def test_a_name_is_resolved_once(server: tuple[str, dict[str, Answer]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is dialled: a second answer of the name server changes nothing."""
    address, answers = server
    answers["/clip.mp4"] = body(b"data")
    port, requested = int(address.rpartition(":")[2]), []

    def resolved(host: str, port: int, **_: Any) -> Any:
        requested.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(
        "keye.media.source.download.socket.getaddrinfo", lambda host, port, *_, **__: resolved(host, port)
    )
    monkeypatch.setattr("keye.media.source.download.is_public", lambda ip: True)
    assert fetch_source(f"http://rebind.example:{port}/clip.mp4").size == 4
    assert requested.count("rebind.example") == 1


@pytest.mark.parametrize(
    ("answer", "limits", "message"),
    [
        (endless, {"download_bytes": 1 << 20}, "sends more than the limit of .* check that it is a file, not a live"),
        (body(b"abc", length=-5), {}, "declares a length of '-5' bytes"),
        (body(b"abc", length="many"), {}, "declares a length of 'many' bytes"),
        (body(b"abcdef", length=4), {}, "sends more than the 4 bytes it declares"),
        (body(b"\0" * 600_000, length=599_999), {}, "sends more than the 599999 bytes it declares"),
        (body(b"\x89PNG\r\n\x1a\n" + b"\0" * 99, length=1 << 30), {}, "1 GiB, more than the limit of 512 MiB"),
        (endless, {"total_seconds": 0.3}, "took more than 0.3 s"),
        (body(b"abc", length=1000), {}, "ended after 3 of 1000 bytes"),
        (body(b"abc", length=1 << 40), {}, "more than the limit of"),
        (body(b"gone", status=404), {}, "answers 404 Not Found"),
        (body(b"<html>", Content_Type="text/html; charset=utf-8"), {}, "is a web page"),
        (body(b"\x1f\x8b", Content_Encoding="gzip"), {}, "sends the file compressed"),
        (body(b""), {}, "is empty"),
        (redirect("/answer"), {}, "redirects more than 5 times"),
        (lambda request: request.wfile.write(b"no http at all\r\n"), {}, "gives no valid HTTP answer"),
    ],
)
def test_servers_that_misbehave(
    server: tuple[str, dict[str, Answer]], answer: Answer, limits: dict[str, Any], message: str
) -> None:
    address, answers = server
    answers["/answer"] = answer
    with pytest.raises(MediaError, match=message) as caught:
        fetch_source(f"{address}/answer?key=secret", limits=FetchLimits(allow_private=True, **limits))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_silent_server(server: tuple[str, dict[str, Answer]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(MediaError, match="sent nothing for 0.2 s"):
            fetch_source(f"http://127.0.0.1:{port}/", limits=FetchLimits(allow_private=True, idle_seconds=0.2))
    with pytest.raises(MediaError, match="cannot be fetched"):
        fetch_source(f"http://127.0.0.1:{port}/", limits=LOCAL)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:///clip.mp4", "the address is not valid"),
        ("http://host:99999/clip.mp4", "the address is not valid"),
        ("http://[::1/clip.mp4", "the address is not valid"),
        ("https://user:word@example.org/clip.mp4", "holds a user name"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        fetch_source(url)


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("keye.media.source.download.socket.getaddrinfo", fails)
    with pytest.raises(MediaError, match="names an unknown host"):
        fetch_source("http://no-such-host.invalid/clip.mp4")


def test_public_addresses() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1"):
        assert is_public(address)
    for address in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1",
        "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::",
    ):  # fmt: skip
        assert not is_public(address), address


def test_an_image_of_no_declared_length_keeps_the_limit_of_images(
    server: tuple[str, dict[str, Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def still(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"\xff\xd8\xff" + b"\0" * 5000)

    address, answers = server
    answers["/still"] = still
    assert fetch_source(f"{address}/still", limits=LOCAL).size == 5003
    monkeypatch.setattr("keye.media.source.fetch.MAX_IMAGE_BYTES", 4000)
    with pytest.raises(MediaError, match="sends more than the limit"):
        fetch_source(f"{address}/still", limits=LOCAL)


def test_a_server_that_keeps_the_connection_open(server: tuple[str, dict[str, Answer]]) -> None:
    done = threading.Event()

    def lingers(request: BaseHTTPRequestHandler) -> None:
        body(b"abc")(request)
        done.wait(20)

    address, answers = server
    answers["/clip"] = lingers
    assert fetch_source(f"{address}/clip", limits=LOCAL).size == 3
    done.set()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://example.org:8080/a.mp4?key=1", "http://example.org:8080/a.mp4"),
        ("https://[2001:db8::1]:8443/a.mp4", "https://[2001:db8::1]:8443/a.mp4"),
        ("https://user:word@example.org/a.mp4#part", "https://example.org/a.mp4"),
    ],
)
def test_addresses_for_people(url: str, text: str) -> None:
    assert redact_url(url) == text
