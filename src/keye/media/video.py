"""Video files: what is in them, which frames are taken and what they cost, and the frames themselves.

All decoding happens in a worker process (`decode_worker`) under limits; this side plans and receives. Times are
seconds from the first frame: the container's own presentation times with the start offset removed.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import keye
from keye.config import ProcessorConfig
from keye.errors import MediaError, Option
from keye.media.fetch import MAX_VIDEO_BYTES, Source, fetch_source
from keye.media.options import DEFAULTS, MediaOptions
from keye.media.plan import VideoPlan, make_plan

_HEADER = struct.Struct("<cQ")
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from keye.media.decode_worker import main; main(sys.argv[2:])"
_PACKAGE_ROOT = str(Path(keye.__path__[0]).parent)


@dataclass(frozen=True)
class DecodeLimits:
    """What a video may cost its decode worker. The pixel limit is checked before anything is decoded.

    `wait_seconds` is the longest wait for the next frame (or for the scan of the file), in wall time.
    """

    memory_bytes: int = 3 * 1024**3
    cpu_seconds: int = 3600
    wait_seconds: float = 600.0
    frame_pixels: int = 40_000_000
    file_bytes: int = MAX_VIDEO_BYTES
    threads: int = 1


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file. `width` and `height` are upright, after `rotation` (degrees counter-clockwise).

    `pts` are the presentation times of all frames that can be shown, ascending, in units of `time_base` seconds, the
    first one being `start_offset`. `exact_times` is false when the container has none and frames were counted.
    `last_duration` is how long the last frame is shown, in the same units, where the container tells.
    """

    name: str
    format: str
    codec: str
    width: int
    height: int
    rotation: int
    fps: float
    time_base: Fraction
    pts: tuple[int, ...] = field(repr=False)
    exact_times: bool
    constant_rate: bool
    declared_duration: float | None
    last_duration: int | None = None

    @property
    def frame_count(self) -> int:
        return len(self.pts)

    @property
    def start_offset(self) -> float:
        """Container time of the first frame, in seconds."""
        return float(self.pts[0] * self.time_base)

    @cached_property
    def timestamps(self) -> tuple[float, ...]:
        """Time of every frame in seconds from the first."""
        numerator, denominator = self.time_base.as_integer_ratio()
        return tuple((p - self.pts[0]) * numerator / denominator for p in self.pts)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last: as long as the container says, else an average frame."""
        last = 1 / self.fps if self.last_duration is None else float(self.last_duration * self.time_base)
        return self.timestamps[-1] + last

    @property
    def cut_short(self) -> bool:
        """Whether the file declares clearly more than can be read from it."""
        return self.declared_duration is not None and self.declared_duration > self.duration

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "format": self.format, "codec": self.codec, "width": self.width, "height": self.height,
            "rotation": self.rotation, "fps": self.fps, "frame_count": self.frame_count, "duration": self.duration,
            "start_offset": self.start_offset, "exact_times": self.exact_times, "constant_rate": self.constant_rate,
            "cut_short": self.cut_short,
        }  # fmt: skip


class VideoReader:
    """An open video with its worker process. Use as a context manager; closing kills the worker.

    Raises `MediaError` on opening when the file is no readable video or breaks a limit; without `wait` when its facts
    or frames are first read.
    """

    def __init__(self, source: Source, limits: DecodeLimits | None = None, *, wait: bool = True) -> None:
        self.limits = limits or DecodeLimits()
        self.source = fetch_source(source, max_bytes=self.limits.file_bytes)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        self._process = self._start()
        try:
            if wait:
                _ = self.info
        except BaseException:
            self.close()
            raise

    @cached_property
    def info(self) -> VideoInfo:
        """Facts about the file, which the worker sends first of all."""
        return self._read_info()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker. May be called more than once."""
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    # Closing flushes; the killed worker no longer reads.
                    continue

    def stop(self) -> None:
        """Kills the worker; whoever reads from it in another thread gets an error, and closes."""
        if self._process.poll() is None:
            self._process.kill()

    def plan(self, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> VideoPlan:
        """Which frames would be sampled and what they would cost."""
        return make_plan(self.info, config, options)

    def frames(self, plan: VideoPlan, *, native: bool = False) -> Iterator[NDArray[np.uint8]]:
        """The planned frames one by one, upright, uint8 RGB [height, width, 3].

        They come at the planned size, shrunk by the worker while it decodes, or at the file's own size if `native`.
        """
        _ = self.info  # comes before any frame
        turned = plan.rotation % 180 != 0
        width, height = (plan.source_width, plan.source_height) if native else (plan.width, plan.height)
        if turned:
            width, height = height, width
        self._request({"targets": plan.pts, "width": width, "height": height})
        for _ in range(plan.frames):
            _, body = self._receive()
            frame = np.frombuffer(body, dtype=np.uint8).reshape(height, width, 3)
            yield np.ascontiguousarray(np.rot90(frame, plan.rotation // 90)) if plan.rotation else frame
        self._receive()

    def read(self, plan: VideoPlan) -> NDArray[np.uint8]:
        """All planned frames, uint8 RGB [frames, height, width, 3]."""
        frames = np.empty((plan.frames, plan.height, plan.width, 3), dtype=np.uint8)
        for i, frame in enumerate(self.frames(plan)):
            frames[i] = frame
        return frames

    def _start(self) -> subprocess.Popen[bytes]:
        limits = self.limits
        options = {
            "threads": limits.threads,
            "pixel_limit": limits.frame_pixels,
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": limits.cpu_seconds,
        }
        with self.source.open_file() as file:
            descriptor = file.fileno()
            return subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, str(descriptor), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                pass_fds=(descriptor,),
                bufsize=0,
            )

    def _request(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            raise self._death() from None

    def _read_info(self) -> VideoInfo:
        _, body = self._receive()
        (length,) = struct.unpack_from("<Q", body)
        facts = json.loads(bytes(body[8 : 8 + length]))
        times = array("q")
        times.frombytes(body[8 + length :])
        return _info(self.source.name, facts, tuple(times))

    def _receive(self) -> tuple[bytes, bytearray]:
        kind, length = _HEADER.unpack(self._read_exactly(_HEADER.size))
        body = self._read_exactly(length)
        if kind == b"E":
            sentence, *options = json.loads(bytes(body))
            if not options:
                raise MediaError(f"{self.source.name} {sentence}")
            raise MediaError("{} " + sentence, self.source.name, *map(Option, options))
        return kind, body

    def _read_exactly(self, count: int) -> bytearray:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + self.limits.wait_seconds
        data = bytearray(count)
        view = memoryview(data)
        filled = 0
        while filled < count:
            left = deadline - time.monotonic()
            # Without any patience it is an error even if the answer has come already: the same on every machine.
            if (left <= 0 and not filled) or not select.select([descriptor], [], [], max(left, 0))[0]:
                self._process.kill()
                raise MediaError(
                    f"{self.source.name} took more than {self.limits.wait_seconds:g} s to decode; "
                    "re-encode it smaller or cut it into parts"
                )
            chunk = os.readv(descriptor, [view[filled:]])
            if chunk == 0:
                raise self._death()
            filled += chunk
        return data

    def _death(self) -> Exception:
        """Why the worker ended without a word: a limit (the file's fault) or a defect (ours)."""
        code = self._process.wait()
        if code == -24:  # SIGXCPU
            return MediaError(
                f"{self.source.name} needs more than {self.limits.cpu_seconds} s of processor time to decode; "
                "re-encode it smaller or cut it into parts"
            )
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").strip()
        if code < 0 or "MemoryError" in log:
            return MediaError(f"{self.source.name} broke the video decoder or its memory limit; re-encode it")
        return RuntimeError(f"the decode worker failed with code {code}: {log or 'no message'}")


def open_video(source: Source, limits: DecodeLimits | None = None) -> VideoReader:
    """Opens a video for planning and reading with one worker process."""
    return VideoReader(source, limits)


def probe(source: Source, limits: DecodeLimits | None = None) -> VideoInfo:
    """Facts about a video file; reads all packets, decodes one frame."""
    with VideoReader(source, limits) as reader:
        return reader.info


def plan_video(
    source: Source, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, limits: DecodeLimits | None = None
) -> VideoPlan:
    """Which frames would be sampled from a video and what they would cost.

    Raises `MediaError` for a file that cannot be used, `KeyeError` for options that contradict the video.
    """
    with VideoReader(source, limits) as reader:
        return reader.plan(config, options)


def iter_frames(
    plan: VideoPlan, source: Source, *, limits: DecodeLimits | None = None
) -> Generator[NDArray[np.uint8], None, None]:
    """The planned frames one by one, uint8 RGB [height, width, 3]. Closing the generator ends the worker."""
    with VideoReader(source, limits) as reader:
        yield from reader.frames(plan)


def read_frames(plan: VideoPlan, source: Source, *, limits: DecodeLimits | None = None) -> NDArray[np.uint8]:
    """All planned frames, uint8 RGB [frames, height, width, 3]."""
    with VideoReader(source, limits) as reader:
        return reader.read(plan)


def _info(name: str, facts: dict[str, Any], pts: tuple[int, ...]) -> VideoInfo:
    time_base = Fraction(*facts["time_base"])
    rotation = round(facts["rotation"] / 90) * 90 % 360
    width, height = facts["width"], facts["height"]
    if rotation % 180:
        width, height = height, width
    fps, constant = _frame_rate(pts, time_base, facts["rate"])
    start = float(pts[0] * time_base)
    declared = facts["declared_end"]
    # Sound may outlast the pictures; the file is cut only where every stream ends before what it declares.
    slack = max(0.5, 2 / fps)
    cut = declared is not None and declared - max(facts["readable_end"], float(pts[-1] * time_base) + 1 / fps) > slack
    return VideoInfo(
        name=name,
        format=facts["format"],
        codec=facts["codec"],
        width=width,
        height=height,
        rotation=rotation,
        fps=fps,
        time_base=time_base,
        pts=pts,
        exact_times=facts["known_times"],
        constant_rate=constant,
        declared_duration=declared - start if cut else None,
        last_duration=facts["last_duration"] if facts["known_times"] else None,
    )


def _frame_rate(pts: tuple[int, ...], time_base: Fraction, declared: list[int] | None) -> tuple[float, bool]:
    """Frames per second, and whether frame i is shown at i / rate to within half a frame.

    The container's average rate is believed where the times bear it out; otherwise the rate is measured.
    """
    rates = [declared[0] / declared[1]] if declared and declared[0] > 0 else []
    if len(pts) > 1:
        rates.append((len(pts) - 1) / float((pts[-1] - pts[0]) * time_base))
    if not rates:
        rates = [1.0]
    seconds = (np.asarray(pts) - pts[0]) * float(time_base)
    for rate in rates:
        if np.abs(seconds * rate - np.arange(len(pts))).max() < 0.5:
            return rate, True
    return rates[-1], False
