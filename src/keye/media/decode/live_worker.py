"""The process that decodes a live stream from a pipe: at most so many frames a second, shrunk, as they come.

Started by `keye.media.live`. Standard library and PyAV. It sends one INFO message (JSON: size and orientation of the
frames that follow), then a FRAME message for each frame that is sampled: its second since the first one, a
little-endian double, and RGB bytes. END follows when the stream ends. It is confined like the worker of files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import av.error
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from keye.media.decode.display import frame_orientation
from keye.media.decode.start import run_worker
from keye.media.decode.video_worker import packed_rgb
from keye.media.decode.wire import END, FRAME, INFO, WorkerError, send, send_error

#: Formats in which a relay writes, by what it says first.
FORMATS = ("mpegts", "nut")
HEADING = 8
#: Seconds after which a clock that jumps counts as a new one that goes on at once.
_JUMP = 10.0
_PROBE = {"analyzeduration": "500000", "probesize": "1000000"}


class Pipe:
    """A pipe as a file that only goes forward, which is what FFmpeg reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size) or b""


class Clock:
    """Seconds since the first frame, from times that may jump."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._offset = 0.0

    def seconds(self, time: float) -> float:
        """Where a frame of this time is."""
        if self._last is None:
            self._offset = -time
        elif not -1.0 < time + self._offset - self._last < _JUMP:
            self._offset = self._last - time
        self._last = time + self._offset
        return self._last


def sample(frames: Iterator[VideoFrame], rate: float) -> Iterator[tuple[float, VideoFrame]]:
    """The first frame in each 1 / `rate` seconds with its second."""
    clock, due = Clock(), 0.0
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            continue
        seconds = clock.seconds(float(frame.pts * frame.time_base))
        if seconds >= due - 1e-6:
            due = max(due + 1 / rate, seconds + 0.5 / rate)
            yield seconds, frame


def decode(file: BinaryIO, options: dict[str, Any]) -> Iterator[VideoFrame]:
    """All frames that can be decoded."""
    name = file.read(HEADING).decode(errors="replace").strip()
    if not name:
        return
    if name not in FORMATS:
        raise WorkerError("is a stream of an unknown format")
    container = av.open(
        Pipe(file), mode="r", format=name, io_open=_reject_open, buffer_size=1 << 16,
        container_options={"protocol_whitelist": "none", **_PROBE},
    )  # fmt: skip
    if not container.streams.video:
        raise WorkerError("has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    context.thread_count = options["threads"]
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue  # damaged on its way, or before the first key
        for frame in frames:
            if frame.width * frame.height > options["pixel_limit"]:
                raise WorkerError(f"has frames of {frame.width}x{frame.height} pixels, more than the limit")
            yield frame


def serve(file: BinaryIO, requests: BinaryIO, out: BinaryIO, options: dict[str, Any]) -> None:
    """Sends what the module's docstring says; there are no requests."""
    resize, size, turn = VideoReformatter(), None, None
    try:
        for seconds, frame in sample(decode(file, options), options["rate"]):
            if size is None:
                turn = frame_orientation(frame)
                scale = min(1.0, (options["max_pixels"] / (frame.width * frame.height)) ** 0.5)
                size = max(1, int(frame.width * scale)), max(1, int(frame.height * scale))
                facts = {"width": size[0], "height": size[1], "rotation": turn.rotation, "mirrored": turn.mirrored}
                send(out, INFO, json.dumps(facts).encode())
            body = packed_rgb(resize, frame, *size, Interpolation.BICUBIC, options["threads"])
            send(out, FRAME, struct.pack("<d", seconds) + body)
        send(out, END, b"")
    except WorkerError as error:
        send_error(out, *error.args)
    except MemoryError:
        send_error(out, "needs more memory to decode than the limit allows")
    except av.error.FFmpegError as error:
        send_error(out, f"is damaged ({error.strerror})")


def _reject_open(url: str, flags: int, options: Any) -> None:
    raise PermissionError("a stream may not open files")


def main(arguments: list[str]) -> None:
    """See `run_worker`."""
    run_worker(arguments, serve)
