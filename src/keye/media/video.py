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
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import keye
from keye.config import ProcessorConfig
from keye.errors import MediaError
from keye.media import sampling
from keye.media.fetch import MAX_VIDEO_BYTES, Source, fetch_source

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
        """Seconds from the first frame to the end of the last, which is taken to last one average frame."""
        return self.timestamps[-1] + 1 / self.fps

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


@dataclass(frozen=True)
class VideoPlan:
    """What will be sampled from a video and what it costs, known before anything is decoded.

    `timestamps` are seconds from the first frame of the file. `width` and `height` are those of the frames the model
    sees; each becomes `tokens_per_frame` visual tokens.
    """

    name: str
    duration: float
    native_fps: float
    source_width: int
    source_height: int
    rotation: int
    frame_indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    pts: tuple[int, ...] = field(repr=False)
    width: int
    height: int
    tokens_per_frame: int

    @property
    def frames(self) -> int:
        return len(self.frame_indices)

    @property
    def visual_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every field but the raw container times, and the counts."""
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "pts"}
        return {**data, "frames": self.frames, "visual_tokens": self.visual_tokens}


class VideoReader:
    """An open video with its worker process. Use as a context manager; closing kills the worker.

    Raises `MediaError` on opening when the file is no readable video or breaks a limit.
    """

    def __init__(self, source: Source, limits: DecodeLimits | None = None) -> None:
        self.limits = limits or DecodeLimits()
        self.source = fetch_source(source, max_bytes=self.limits.file_bytes)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        self._process = self._start()
        try:
            self.info = self._read_info()
        except BaseException:
            self.close()
            raise

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

    def plan(self, config: ProcessorConfig, **options: Any) -> VideoPlan:
        """See `plan_video` for the options."""
        return make_plan(self.info, config, **options)

    def frames(self, plan: VideoPlan) -> Iterator[NDArray[np.uint8]]:
        """The planned frames one by one, upright, uint8 RGB [height, width, 3]."""
        turned = plan.rotation % 180 != 0
        width, height = (plan.height, plan.width) if turned else (plan.width, plan.height)
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
            raise MediaError(f"{self.source.name} {body.decode()}")
        return kind, body

    def _read_exactly(self, count: int) -> bytearray:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + self.limits.wait_seconds
        data = bytearray(count)
        view = memoryview(data)
        filled = 0
        while filled < count:
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
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
    source: Source, config: ProcessorConfig, *, limits: DecodeLimits | None = None, **options: Any
) -> VideoPlan:
    """Which frames would be sampled from a video and what they would cost.

    Options are those of `make_plan`. Raises `MediaError` for a file that cannot be used, `KeyeError` for options
    that contradict each other or the video.
    """
    with VideoReader(source, limits) as reader:
        return reader.plan(config, **options)


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


def make_plan(
    info: VideoInfo,
    config: ProcessorConfig,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    video_total_pixels: float | None = None,
    video_start: float | None = None,
    video_end: float | None = None,
    video_count: int = 1,
) -> VideoPlan:
    """The plan for a probed video: official 2.0 rules for the number of frames, their places and their size.

    At a constant frame rate the official indices are taken as they are. At a variable rate they are turned into times
    spread evenly over the chosen range, and the frame on display at each is taken once. `fps` samples per second,
    `nframes` a fixed number instead; `min_pixels` and `max_pixels` limit one frame, `video_total_pixels` all of them;
    `video_start` and `video_end` in seconds; `video_count` videos share the configured budget.
    """
    for option, value in (("fps", fps), ("nframes", nframes), ("min_frames", min_frames), ("max_frames", max_frames)):
        if value is not None and value <= 0:
            raise MediaError(f"{option} is {value}; it must be above 0")
    if info.cut_short and (video_end is None or video_end > info.duration):
        raise MediaError(
            f"{info.name} is cut short: {info.duration:.1f} of {info.declared_duration:.1f} s can be read; "
            f"download it again or pass video_end={int(info.duration * 10) / 10}"
        )
    first, last, count = _frame_range(info, video_start, video_end)
    budget = sampling.total_pixels(
        config, count / info.fps, video_total_pixels=video_total_pixels, video_count=video_count
    )
    indices = sampling.sample_frames(
        count, info.fps, config, fps=fps, nframes=nframes, min_frames=min_frames, max_frames=max_frames,
        video_total_pixels=budget, first=first,
    )  # fmt: skip
    if not info.constant_rate and last > first:
        indices = _by_time(info, indices, first, last)
    if not indices:
        raise MediaError(f"the token budget for {info.name} holds no frame; raise video_total_pixels")
    height, width = sampling.frame_size(
        info.height, info.width, len(indices), config,
        min_pixels=min_pixels, max_pixels=max_pixels, video_total_pixels=budget,
    )  # fmt: skip
    return VideoPlan(
        name=info.name,
        duration=info.duration,
        native_fps=info.fps,
        source_width=info.width,
        source_height=info.height,
        rotation=info.rotation,
        frame_indices=tuple(indices),
        timestamps=tuple(info.timestamps[i] for i in indices),
        pts=tuple(info.pts[i] for i in indices),
        width=width,
        height=height,
        tokens_per_frame=(height // config.factor) * (width // config.factor),
    )


def _frame_range(info: VideoInfo, start: float | None, end: float | None) -> tuple[int, int, int]:
    if info.constant_rate:
        return sampling.frame_range(info.frame_count, info.fps, video_start=start, video_end=end)
    return sampling.time_range(info.timestamps, video_start=start, video_end=end)


def _by_time(info: VideoInfo, indices: list[int], first: int, last: int) -> list[int]:
    """The frames on display at the times that the indices would have if frames were evenly spaced."""
    begin, end = info.timestamps[first], info.timestamps[last]
    scale = (end - begin) / (last - first)
    targets = [begin + (i - first) * scale for i in indices]
    return sampling.displayed_frames(info.timestamps, targets, tolerance=1e-3)


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
