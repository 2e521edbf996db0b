"""What an untrusted user may name: addresses by how they are written, and by where they lead. Every refusal has a twin
that passes."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.config.media import FetchLimits
from keye.errors import KeyeError, MediaError
from keye.media.image import read_image
from keye.media.source.fetch import FetchPolicy, fetch_source, untrusted
from keye.media.source.hosts import check_address, parse_host_rule

RULES = ("media.example", "*.cdn.example", "files.example:8443", "93.184.216.34")


@pytest.mark.parametrize(
    "url",
    [
        "http://media.example/clip.mp4",
        "https://media.example",
        "https://MEDIA.example/a%20b.mp4?token=1&x=@y#t",
        "https://media.example:443/clip.mp4",
        "https://a.cdn.example/clip.mp4",
        "https://b.a.cdn.example/clip.mp4",
        "https://files.example:8443/clip.mp4",
        "http://93.184.216.34/clip.mp4",
    ],
)
def test_plain_addresses_of_allowed_hosts_pass(url: str) -> None:
    check_address(url, RULES)


@pytest.mark.parametrize(
    "url",
    [
        "http://media.example\\@evil.example/",
        "http://evil.example\\.media.example/",
        "http://media.example%2f@evil.example/",
        "http://media.example@evil.example/",
        "http://user:word@media.example/",
        "http://@media.example/",
        "http:/media.example/",
        "http:media.example/",
        "http:///media.example/",
        "HTTP\t://media.example/",
        "http://media.exam\tple/",
        "http://media.example/\r\nHost: evil.example",
        " http://media.example/",
        "http://media.example/ clip.mp4",
        "http://mediа.example/",  # noqa: RUF001 (a Cyrillic letter)
        "http://media。example/",
        "http://media.example./clip.mp4",
        "http://media..example/",
        "http://.media.example/",
        "http://media.example:0/",
        "http://media.example:/",
        "http://media.example:443/",  # the other scheme's port
        "http://media.example:22/",
        "https://media.example:6379/",
        "https://files.example/",
        "http://media.example:99999/",
        "http://media.example:8o/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://93.184.216.034/",
        "http://[::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[::ffff:93.184.216.34]/",
        "http://cdn.example/",
        "http://evilcdn.example/",
        "http://media.example.evil.example/",
        "http://media.example?@evil.example:80/../" + "x" * 3000,
        "ftp://media.example/",
        "gopher://media.example/",
        "",
    ],
)
def test_other_addresses_do_not(url: str) -> None:
    with pytest.raises(MediaError):
        check_address(url, RULES)


def test_no_address_passes_unless_a_host_is_allowed() -> None:
    with pytest.raises(MediaError, match="not fetched by this server; upload the file"):
        check_address("https://media.example/clip.mp4", ())


@pytest.mark.parametrize("rule", ["media.example", "Media.Example", "*.cdn.example", "h:8080", "localhost", "10.1.2.3"])
def test_rules(rule: str) -> None:
    assert parse_host_rule(rule) == rule.lower()


@pytest.mark.parametrize(
    "rule",
    ["", "*", "*.example", "https://a.example", "a.example/", "a b", "a:0", "a:x", "*.1", "0x7f.1", "-a.b", "ä.b"],
)
def test_rules_that_cannot_be(rule: str) -> None:
    with pytest.raises(KeyeError, match="not a host that can be allowed"):
        parse_host_rule(rule)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "etc/passwd", "../secret.mp4", "~/.ssh/id_rsa", "file:///etc/passwd", "FILE:/etc/passwd",
        "/proc/self/environ", "\\\\host\\share\\clip.mp4", "fd:0", "concat:/etc/passwd|/etc/hosts", "C:\\clip.mp4",
        "subfile,,start,0,end,9,,:/etc/passwd", "rtsp://media.example/", "data", "", "http", "blob:x", "pipe:0",
    ],
)  # fmt: skip
def test_paths_cannot_be_named(name: str) -> None:
    for ask in (FetchPolicy().fetch, FetchPolicy().fetch_list):
        with pytest.raises(MediaError, match="files of the server cannot be named"):
            ask(name)


@pytest.mark.parametrize("name", [b"bytes", Path("clip.mp4"), None, 3, ["a"], {"url": "x"}])
def test_only_text_names_a_medium(name: object) -> None:
    with pytest.raises(MediaError, match="a medium is named by"):
        FetchPolicy().fetch(name)


def png(width: int = 60, height: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 0, 0)).save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_a_data_url_passes() -> None:
    source = FetchPolicy().fetch(data_url(png()), "image")
    assert source.untrusted
    assert read_image(source).size == (60, 40)
    assert FetchPolicy().fetch_list(data_url(png())) is None


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (data_url(png(), "text/html"), "does not say that it holds an image"),
        (data_url(png(), "video/mp4"), "does not say that it holds an image"),
        ("data:image/png;base64,a!b", "not valid base64"),
        ("data:image/png," + "A" * 1003, "more than the limit"),
        ("data:image/png;base64,data:image/png;base64,AAAA", "not valid base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64," + "A" * 2000, "more than the limit"),
    ],
)
def test_data_urls_that_do_not(url: str, sentence: str) -> None:
    with pytest.raises(MediaError, match=sentence):
        FetchPolicy(image_bytes=1000).fetch(url, "image")


def test_a_list_of_pictures_is_counted_before_it_is_decoded() -> None:
    frame = base64.b64encode(png()).decode()
    frames = FetchPolicy(list_frames=3).fetch_list("data:video/jpeg;base64," + ",".join([frame] * 3))
    assert frames is not None
    assert [source.untrusted for source in frames] == [True] * 3
    with pytest.raises(MediaError, match="holds 100,000 pictures, more than the limit of 3"):
        FetchPolicy(list_frames=3).fetch_list("data:video/jpeg;base64," + ",".join(["%"] * 100_000))


class Web:
    """A web server on this machine under the name media.example, which the tests' resolver calls public."""

    def __init__(self, port: int, answers: dict[str, tuple[int, str, bytes]]) -> None:
        self.port, self.answers = port, answers
        self.policy = FetchPolicy(hosts=(f"media.example:{port}", f"*.cdn.example:{port}"))

    def address(self, path: str, host: str = "media.example") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    answers: dict[str, tuple[int, str, bytes]] = {"/clip.png": (200, "", png())}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, location, body = answers[self.path.partition("?")[0]]
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    resolve = socket.getaddrinfo
    here = {"media.example", "a.cdn.example"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.0.1" if host in here else host, *a, **k)
    )
    monkeypatch.setattr("keye.media.source.download.is_public", lambda ip: ip == "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield Web(server.server_port, answers)
        server.shutdown()


def test_an_allowed_host_is_fetched_from(web: Web) -> None:
    source = web.policy.fetch(web.address("/clip.png"), "image")
    assert source.untrusted
    assert read_image(source).size == (60, 40)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_held_to_the_same_rules(web: Web, status: int) -> None:
    web.answers["/moved"] = (status, web.address("/clip.png", "a.cdn.example"), b"")
    assert web.policy.fetch(web.address("/moved"), "image").size == len(png())
    for target in (
        "http://10.0.0.1/", "http://evil.example/", "file:///etc/passwd", "gopher://media.example/", "//evil.example/",
        "ftp://media.example/", f"http://media.example:{web.port + 1}/", "http://media.example\\@evil.example/",
    ):  # fmt: skip
        web.answers["/moved"] = (status, target, b"")
        with pytest.raises(MediaError):
            web.policy.fetch(web.address("/moved"))


def test_three_redirects_and_no_more(web: Web) -> None:
    for i in range(4):
        web.answers[f"/{i}"] = (302, f"/{i - 1}" if i else "/clip.png", b"")
    assert web.policy.fetch(web.address("/2"), "image").size == len(png())
    with pytest.raises(MediaError, match="redirects more than 3 times"):
        web.policy.fetch(web.address("/3"), "image")


@pytest.mark.parametrize("answers", [["10.0.0.1"], ["127.0.0.1", "169.254.169.254"], ["::1"], ["::ffff:10.0.0.1"]])
def test_a_name_that_leads_inside(web: Web, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    # All answers must be public, so that no choice between them can lead inside; and no message names one.
    result = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, web.port)) for answer in answers]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: result)
    with pytest.raises(MediaError, match="leads to a private address") as error:
        web.policy.fetch(web.address("/clip.png"))
    assert answers[-1] not in str(error.value)


def test_a_name_is_resolved_once(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    # DNS rebinding: the second answer would lead inside, but the address that was checked is the one dialled.
    requested: list[str] = []

    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        if host == "127.0.0.1":  # the dialling of a number
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        requested.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (["127.0.0.1", "10.0.0.1"][len(requested) - 1], port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert web.policy.fetch(web.address("/clip.png"), "image").size == len(png())
    assert requested == ["media.example"]


def test_an_uploaded_file_is_marked_untrusted(tmp_path: Path) -> None:
    path = tmp_path / "upload.png"
    path.write_bytes(png())
    assert not fetch_source(path).untrusted
    assert untrusted(fetch_source(path)).untrusted


def test_hosts_do_not_bind_the_owner_of_the_machine(web: Web) -> None:
    assert fetch_source(web.address("/clip.png"), limits=FetchLimits()).size == len(png())
