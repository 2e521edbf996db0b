"""Live sources: frames of a file played on a clock, of a camera, or of an RTSP address, as they come.

A relay (`decode.relay_worker`) that may open the source and nothing else copies coded packets to a pipe; a confined
worker without network or files (`decode.live_worker`) decodes them. Between the two this side retains the bytes of the
last two minutes, of which clips are cut without decoding.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from keye.config.environment import worker_environment
from keye.config.media import MediaOptions
from keye.errors import KeyeError, MediaError
from keye.files import output_file
from keye.media.clips import cut_clips
from keye.media.decode.live_worker import HEADING
from keye.media.decode.relay_worker import NO_VIDEO, UNAUTHORIZED
from keye.media.decode.wire import FRAME, INFO
from keye.media.decode.workers import BOOT, DecodeLimits, Worker
from keye.media.pixels.patches import Pixels
from keye.media.plan import VideoPlan
from keye.media.source.fetch import Source
from keye.media.source.forward import PORTS, Forwarder, StreamAddress
from keye.media.video import VideoReader
from keye.version import PACKAGE_FOLDER

#: A live stream is decoded for as long as it lasts; silence of so many seconds ends the connection.
LIVE_LIMITS: Final = DecodeLimits(cpu_seconds=365 * 24 * 3600, wait_seconds=30.0, memory_bytes=2 * 1024**3)
#: Bytes and seconds of coded video that are retained for clips; seconds before and after an event in a clip.
_CLIP_BYTES, CLIP_SECONDS, CLIP_PAD = 96 << 20, 120.0, 3.0
_CHUNK: Final = 1 << 16
#: What begins each sync point of NUT, before the first of which its header stands, within so many bytes.
_NUT_SYNC, _NUT_HEADER = bytes.fromhex("4e4be4adeeca4569"), 1 << 18


@dataclass(frozen=True)
class LiveFrame:
    """A frame, uint8 RGB [H, W, 3], upright, its second since the source began, and when it came (`time.monotonic`)."""

    time: float
    picture: Pixels = field(repr=False)
    arrived: float


class LiveSource(Protocol):
    """Frames that come one after another; a source that drops may be opened again."""

    name: str
    #: Whether the source goes on after it has ended: then it is opened again.
    is_endless: bool

    def frames(self) -> Iterator[LiveFrame]:
        """Opens the source and gives its frames until it ends. Raises `MediaError` where it cannot be read."""

    def write_clip(self, start: float, end: float, folder: Path, name: str) -> Path | None:
        """A clip of these seconds; None where they are no longer here."""

    def close(self) -> None:
        """Ends `frames` in another thread."""


class PlayedFile:
    """A video file, played `speed` times as fast as it was recorded, or, at 0, as fast as it can be read."""

    is_endless = False

    def __init__(self, source: Source, *, rate: float, max_pixels: int, speed: float = 1.0) -> None:
        self.name, self._source = source.name, source
        self._rate, self._max_pixels, self._speed = rate, max_pixels, speed
        self._closed = threading.Event()

    def frames(self) -> Iterator[LiveFrame]:
        with VideoReader(self._source) as reader:
            info, begin = reader.info, time.monotonic()
            due, chosen = info.timestamps[0], list[int]()
            for index, second in enumerate(info.timestamps):
                if second >= due - 1e-6:
                    chosen.append(index)
                    due = max(due + 1 / self._rate, second + 0.5 / self._rate)
            scale = min(1.0, (self._max_pixels / (info.width * info.height)) ** 0.5)
            size = max(1, int(info.height * scale)), max(1, int(info.width * scale))
            looks = MediaOptions(tone_map=True)
            plan = VideoPlan.of(info, chosen, size, tokens_per_frame=0, rate=self._rate, options=looks)
            for second, picture in zip(plan.timestamps, reader.frames(plan), strict=True):
                if self._speed and self._closed.wait(max(0.0, begin + second / self._speed - time.monotonic())):
                    return
                if self._closed.is_set():
                    return
                yield LiveFrame(second, picture, time.monotonic())

    def write_clip(self, start: float, end: float, folder: Path, name: str) -> Path | None:
        paths = cut_clips(self._source, [(start, end)], folder)
        return paths[0] if paths else None

    def close(self) -> None:
        self._closed.set()


class StreamSource:
    """An RTSP address, or a device file of a camera (`device`)."""

    is_endless = True

    def __init__(
        self, address: StreamAddress | None, *, device: Path | None = None, rate: float, max_pixels: int,
        limits: DecodeLimits = LIVE_LIMITS,
    ) -> None:  # fmt: skip
        assert (address is None) != (device is None)
        self.name = address.name if address is not None else str(device)
        self._address, self._device, self._limits = address, device, limits
        self._options = {"rate": rate, "max_pixels": max_pixels, "pixel_limit": limits.frame_pixels,
                         "threads": limits.threads}  # fmt: skip
        self._begin: float | None = None
        self._recent = _Recent()
        self._open = ExitStack()
        self._lock = threading.Lock()

    def frames(self) -> Iterator[LiveFrame]:
        with ExitStack() as stack:
            worker, relay = self._connect(stack)
            offset, turn = None, None
            try:
                while True:
                    kind, body = worker.receive(8 + 3 * int(self._options["max_pixels"]))
                    arrived = time.monotonic()
                    if kind == INFO and turn is None:
                        turn = _read_facts(worker, body, int(self._options["max_pixels"]))
                        continue
                    if kind != FRAME or turn is None or len(body) != 8 + turn.width * turn.height * 3:
                        break
                    (seconds,) = struct.unpack_from("<d", body)
                    if not 0 <= seconds < 1e9:
                        raise worker.broken()
                    if self._begin is None:
                        self._begin = arrived
                    if offset is None:  # the clock goes on where a source that was lost comes again
                        offset = arrived - self._begin
                    yield LiveFrame(offset + seconds, turn.upright(body), arrived)
            finally:
                _end(relay)
            self._explain(relay.wait())

    def _connect(self, stack: ExitStack) -> tuple[Worker, subprocess.Popen[bytes]]:
        """Starts forwarder, relay, decoder, and the thread that passes bytes between the two processes."""
        options: dict[str, Any] = {"memory_bytes": self._limits.memory_bytes, "cpu_seconds": self._limits.cpu_seconds}
        if self._address is not None:
            forwarder = stack.enter_context(Forwarder(self._address))
            options |= {"url": self._address.through(forwarder.port), "port": forwarder.port}
        else:
            options["device"] = str(self._device)
        relay = _start_relay(options)
        stack.callback(_end, relay)
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            try:
                worker = Worker("keye.media.decode.live_worker", pipe, self._options, self._limits, name=self.name,
                                what="live decoder", untrusted=True)  # fmt: skip
            except BaseException:
                os.close(writing)
                raise
        stack.callback(worker.close)
        threading.Thread(target=self._recent.copy, args=(relay, writing), name="keye-relay", daemon=True).start()
        with self._lock:
            self._open = ExitStack()
            self._open.callback(worker.stop)
        return worker, relay

    def _explain(self, code: int) -> None:
        if code == UNAUTHORIZED:
            raise MediaError(f"{self.name} asks for another user or password; write rtsp://user:password@host/path")
        if code == NO_VIDEO:
            raise MediaError(f"{self.name} has no video")

    def write_clip(self, start: float, end: float, folder: Path, name: str) -> Path | None:
        if self._begin is None:
            return None
        data, suffix = self._recent.take(self._begin + start - CLIP_PAD, self._begin + end + CLIP_PAD)
        if not data:
            return None
        path = folder / f"{name}.{suffix}"
        with output_file(path) as draft:
            folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(data)
        return path

    def close(self) -> None:
        with self._lock:
            self._open.close()


class _Recent:
    """Coded bytes of the last seconds, each piece with when it came."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._bytes, self._format, self._lock = 0, "ts", threading.Lock()
        #: Of NUT the first bytes, whose header a clip needs.
        self._first = b""

    def copy(self, relay: subprocess.Popen[bytes], target: int) -> None:
        """Passes what a relay writes on to the decoder until one of them ends."""
        assert relay.stdout is not None
        source = relay.stdout.fileno()
        with suppress(OSError), os.fdopen(target, "wb", buffering=0) as out:
            heading = b""
            while len(heading) < HEADING and (data := os.read(source, HEADING - len(heading))):
                heading += data
            out.write(heading)
            with self._lock:  # pieces of another connection do not go together with those of this one
                self._pieces.clear()
                self._first = b""
                self._bytes, self._format = 0, "ts" if heading.startswith(b"mpegts") else "nut"
            while data := os.read(source, _CHUNK):
                self._add(data)
                view = memoryview(data)
                while view:
                    view = view[out.write(view) :]

    def _add(self, data: bytes) -> None:
        now = time.monotonic()
        with self._lock:
            if self._format == "nut" and len(self._first) < _NUT_HEADER and _NUT_SYNC not in self._first:
                self._first += data
            self._pieces.append((now, data))
            self._bytes += len(data)
            while self._bytes > _CLIP_BYTES or self._pieces[0][0] < now - CLIP_SECONDS:
                self._bytes -= len(self._pieces.popleft()[1])

    def take(self, start: float, end: float) -> tuple[bytes, str]:
        """A stream of the bytes that came between two times, and the suffix of its format."""
        with self._lock:
            data, suffix = b"".join(data for when, data in self._pieces if start <= when <= end), self._format
            header = self._first.partition(_NUT_SYNC)[0]
        if suffix == "nut":
            at = data.find(_NUT_SYNC)
            data = header + data[at:] if at >= 0 else b""
        return data, suffix


@dataclass(frozen=True)
class _Turn:
    """How the frames of a stream become upright."""

    width: int
    height: int
    rotation: int
    mirrored: bool

    def upright(self, body: bytearray) -> Pixels:
        frame = np.frombuffer(body, np.uint8, offset=8).reshape(self.height, self.width, 3)
        turned = np.rot90(frame, self.rotation // 90)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)


def _read_facts(worker: Worker, body: bytearray, most: int) -> _Turn:
    try:
        facts = json.loads(bytes(body))
        width, height, rotation = (int(facts[name]) for name in ("width", "height", "rotation"))
        turn = _Turn(width, height, rotation, bool(facts["mirrored"]))
    except (ValueError, TypeError, LookupError, RecursionError):
        raise worker.broken() from None
    if not 0 < turn.width * turn.height <= most or min(turn.width, turn.height) < 1 or turn.rotation % 90:
        raise worker.broken()
    return turn


def _start_relay(options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The relay; what it is to open, which may hold a password, comes by its standard input."""
    paths = [str(PACKAGE_FOLDER.parent), *(os.path.abspath(path) for path in sys.path if path)]
    relay = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", BOOT, json.dumps(paths), "keye.media.decode.relay_worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=worker_environment(), cwd="/",
    )  # fmt: skip
    assert relay.stdin is not None
    with suppress(BrokenPipeError):
        relay.stdin.write(json.dumps(options).encode() + b"\n")
        relay.stdin.close()
    return relay


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def open_live(
    name: str, fetch: Callable[[str], Source], *, rate: float, max_pixels: int, speed: float = 1.0,
    allow_private: bool = False,
) -> LiveSource:  # fmt: skip
    """The live source that a user names: an rtsp(s) address, a device file, or a video file, which `fetch` opens."""
    if name.partition("://")[0].lower() in PORTS:
        address = StreamAddress.parse(name, allow_private=allow_private)
        return StreamSource(address, rate=rate, max_pixels=max_pixels)
    path = Path(name)
    with suppress(OSError, ValueError):
        if stat.S_ISCHR(path.stat().st_mode):
            return StreamSource(None, device=path.resolve(), rate=rate, max_pixels=max_pixels)
    if "://" in name and not name.startswith(("http://", "https://", "file://")):
        raise KeyeError(f"{name.partition('://')[0]}:// is not a live source; give rtsp://, a device or a video file")
    return PlayedFile(fetch(name), rate=rate, max_pixels=max_pixels, speed=speed)
