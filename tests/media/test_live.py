"""Live sources: one connection and no other, a decoder that reads a pipe, files played on a clock, clips of packets."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from keye.errors import KeyeError, MediaError
from keye.media.decode.live_worker import Clock
from keye.media.decode.wire import END, FRAME, INFO
from keye.media.decode.workers import DecodeLimits, Worker
from keye.media.live import CLIP_PAD, PlayedFile, StreamSource, open_live
from keye.media.source.fetch import fetch_source
from keye.media.source.forward import DIAL_SECONDS, Forwarder, StreamAddress
from keye.media.video import probe
from tests.media.test_sandbox import confined, linux
from tests.support.clips import coded_frame, read_code, write_clip


@pytest.fixture
def echo() -> Iterator[int]:
    """A server on the loopback that sends back what it gets in capitals, to one client."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):  # no client came, and the server was closed
                client, _ = server.accept()
                with client:
                    while data := client.recv(100):
                        client.sendall(data.upper())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


def test_a_forwarder_passes_bytes_to_the_address_and_back(echo: int) -> None:
    address = StreamAddress.parse(f"rtsp://user:secret@127.0.0.1:{echo}/live?key=1", allow_private=True)
    assert address.name == f"rtsp://127.0.0.1:{echo}/live"
    with Forwarder(address) as forwarder:
        assert address.through(forwarder.port) == f"rtsp://user:secret@127.0.0.1:{forwarder.port}/live?key=1"
        with socket.create_connection(("127.0.0.1", forwarder.port), timeout=10) as client:
            client.sendall(b"describe")
            assert client.recv(100) == b"DESCRIBE"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", forwarder.port), timeout=1).close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_an_encrypted_server_that_sends_tickets_gets_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = (
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {certificate} -days 2"
    )
    subject = ["-subj", "/CN=camera", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *words.split(), *subject], check=True, capture_output=True)
    is_reading = threading.Event()

    class Far(ssl.SSLSocket):
        def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
            is_reading.set()
            return super().recv(buflen, flags)

    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.sslsocket_class = Far
    trusting.minimum_version = ssl.TLSVersion.TLSv1_3
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with serving.wrap_socket(client, server_side=True) as encrypted:
                while data := encrypted.recv(100):
                    encrypted.sendall(data.upper() * 1000)

        threading.Thread(target=serve, daemon=True).start()
        url = f"rtsps://127.0.0.1:{server.getsockname()[1]}/live"
        with (
            Forwarder(StreamAddress.parse(url, allow_private=True)) as forwarder,
            # Less patience than the forwarder has for what does not come.
            socket.create_connection(("127.0.0.1", forwarder.port), timeout=DIAL_SECONDS / 2) as client,
        ):
            assert is_reading.wait(30)  # the tickets, before anything was asked
            for _ in range(2):
                client.sendall(b"describe")
                with client.makefile("rb") as answer:
                    assert answer.read(8000) == b"DESCRIBE" * 1000


def test_a_name_is_dialled_at_each_of_its_addresses(echo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def answers(host: str, *arguments: Any, **more: Any) -> list[Any]:
        addresses = ["127.0.0.2", "127.0.0.1"] if host == "camera.test" else [host]
        return [answer for address in addresses for answer in resolve(address, *arguments, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", answers)
    with StreamAddress.parse(f"rtsp://camera.test:{echo}/live", allow_private=True).dial() as connection:
        assert connection.getpeername()[0] == "127.0.0.1"


def test_private_addresses_need_permission(echo: int) -> None:
    with pytest.raises(MediaError, match="private address 127.0.0.1; give allow_private_urls"):
        Forwarder(StreamAddress.parse(f"rtsp://127.0.0.1:{echo}/live"))


@pytest.mark.parametrize("url", ["http://host/x", "rtsp:///x", "rtsp://host:0/x", "rtsp://host/a b", "rtsp://höst/x"])
def test_addresses_that_are_not_plain(url: str) -> None:
    with pytest.raises(MediaError, match="not valid"):
        StreamAddress.parse(url)


_REACH = "confine(1 << 30, 5, sandbox.Reach(port={port}))"


@linux
@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("socket.socket().connect(('127.0.0.1', {port}))", b"done"),
        ("socket.socket().connect(('127.0.0.1', 9))", b"refused: PermissionError"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", b"refused: PermissionError"),
        ("socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)", b"refused: PermissionError"),
        ("socket.socket(socket.AF_INET6, socket.SOCK_STREAM)", b"refused: PermissionError"),
        ("socket.socket().bind(('127.0.0.1', 0))", b"refused: PermissionError"),
        ("open('/etc/passwd')", b"refused: PermissionError"),
        ("os.fork()", b"refused: PermissionError"),
    ],
)
def test_a_relay_reaches_its_port_and_nothing_else(echo: int, code: str, outcome: bytes) -> None:
    result = confined(code.format(port=echo), _REACH.format(port=echo)).stdout
    if "9)" in code and result == b"refused: ConnectionRefusedError":
        pytest.skip("this kernel limits no ports")
    assert result == outcome


@linux
def test_a_relay_of_a_device_reads_it_and_nothing_else(tmp_path: Path) -> None:
    device, other = tmp_path / "device", tmp_path / "other"
    for path in (device, other):
        path.write_bytes(b"x")
    layers = f"confine(1 << 30, 5, sandbox.Reach(device={str(device)!r}))"
    assert confined(f"open({str(device)!r}).read()", layers).stdout == b"done"
    assert confined(f"open({str(other)!r}).read()", layers).stdout == b"refused: PermissionError"
    assert confined("socket.socket()", layers).stdout == b"refused: PermissionError"


def transport_stream(frames: int = 60, fps: int = 30) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=fps, options={"bf": "0", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def test_the_decoder_samples_a_pipe() -> None:
    reading, writing = os.pipe()
    options = {"rate": 2.0, "max_pixels": 80 * 48, "pixel_limit": 1 << 20, "threads": 1}
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        worker = Worker("keye.media.decode.live_worker", pipe, options, DecodeLimits(), name="x", what="decoder")
    with os.fdopen(writing, "wb") as out:
        out.write(b"mpegts  " + transport_stream())
    kind, body = worker.receive(1 << 20)
    assert kind == INFO and json.loads(bytes(body))["width"] == 80
    numbers = []
    while (message := worker.receive(1 << 20))[0] == FRAME:
        picture = bytes(message[1][8:])
        (second,) = struct.unpack_from("<d", message[1])
        numbers.append((round(second, 2), read_code(np.frombuffer(picture, np.uint8).reshape(48, 80, 3))))
    worker.close()
    assert message[0] == END
    assert numbers == [(0.0, 0), (0.5, 15), (1.0, 30), (1.5, 45)]


def test_a_clock_goes_on_where_that_of_a_stream_jumps() -> None:
    clock = Clock()
    assert [clock.seconds(time) for time in (100.0, 100.5, 5.0, 5.5, 90000.0, 90000.5)] == [0, 0.5, 0.5, 1.0, 1.0, 1.5]


def test_a_file_is_played_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=60, fps=30)
    source = open_live(str(path), fetch_source, rate=2.0, max_pixels=1 << 20, speed=0)
    assert isinstance(source, PlayedFile) and not source.is_endless
    frames = list(source.frames())
    assert [(frame.time, read_code(frame.picture)) for frame in frames] == [(0, 0), (0.5, 15), (1, 30), (1.5, 45)]
    clip = source.write_clip(0.5, 1.5, tmp_path / "clips", "name")
    assert clip is not None and probe(clip).duration == pytest.approx(1.0, abs=0.05)


def test_a_clip_of_a_camera_can_be_read_though_its_header_came_long_before(tmp_path: Path) -> None:
    path, noise = tmp_path / "camera.nut", np.random.default_rng(0)
    with av.open(str(path), "w", format="nut") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuvj420p"
        for _ in range(60):
            picture = noise.integers(0, 256, (96, 160, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(b"nut     " + path.read_bytes())
    source = StreamSource(None, device=tmp_path / "camera", rate=2.0, max_pixels=1 << 20)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as relay:
        source._recent.copy(relay, os.open(os.devnull, os.O_WRONLY))
    source._begin = source._recent._pieces[1][0]  # after the header
    clip = source.write_clip(CLIP_PAD, CLIP_PAD, tmp_path / "clips", "event")
    assert clip is not None and clip.suffix == ".nut"
    with av.open(str(clip)) as container:
        assert 10 < len(list(container.decode(video=0))) < 60
    with pytest.raises(KeyeError, match="cannot be written"):
        source.write_clip(CLIP_PAD, CLIP_PAD, path / "clips", "event")


def test_sources_that_cannot_be_watched() -> None:
    with pytest.raises(KeyeError, match="rtmp:// is not a live source"):
        open_live("rtmp://host/x", fetch_source, rate=2.0, max_pixels=1 << 20)
    source = open_live("rtsp://host.invalid/x", fetch_source, rate=2.0, max_pixels=1 << 20)
    with pytest.raises(MediaError, match=r"unknown host|cannot be reached"):
        next(source.frames())


_SERVER = """
import sys, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1"); server.set_service("0")
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(f"( filesrc location={sys.argv[1]} ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval=1 )")
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


def rtsp_server(path: Path) -> subprocess.Popen[str]:
    """GStreamer's RTSP server for a file, under Debian's Python; its first line is the port. Skips without it."""
    python = "/usr/bin/python3"
    check = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    try:
        is_there = subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        is_there = False
    if not is_there:
        pytest.skip("GStreamer's RTSP server is not installed (gir1.2-gst-rtsp-server-1.0, python3-gi)")
    return subprocess.Popen([python, "-c", _SERVER, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_an_rtsp_stream_is_relayed_decoded_and_clipped(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=150, fps=30, gop=15, options={"bf": "0"})
    with rtsp_server(path) as server:
        try:
            assert server.stdout is not None
            url = f"rtsp://127.0.0.1:{int(server.stdout.readline())}/live"
            with pytest.raises(MediaError, match="private address"):
                list(open_live(url, fetch_source, rate=2.0, max_pixels=1 << 20).frames())
            source = open_live(url, fetch_source, rate=2.0, max_pixels=1 << 20, allow_private=True)
            assert isinstance(source, StreamSource)
            frames = list(source.frames())
            numbers = [read_code(frame.picture) for frame in frames]
            assert numbers == pytest.approx([15 * i for i in range(10)], abs=1)
            clip = source.write_clip(1.0, 2.0, tmp_path / "clips", "event")
            assert clip is not None and clip.suffix == ".ts" and probe(clip).duration > 1.0
        finally:
            server.kill()
