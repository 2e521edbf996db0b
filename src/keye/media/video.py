"""Video files: what is in them, which frames are taken and what they cost, and the frames themselves.

All decoding happens in a worker process (`decode_worker`) under limits; this side plans and receives. Times are
seconds on the clock that players show: the container's own presentation times, counted from the container's start.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
from array import array
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.errors import KeyeError, MediaError, warn
from keye.media.container.kinds import is_png_or_webp
from keye.media.damage import damage_notes, decoded_damage
from keye.media.decode.wire import END, FRAME, INFO
from keye.media.decode.workers import STRANGERS, Worker
from keye.media.decode.workers import DecodeLimits as DecodeLimits
from keye.media.notes import VISIBLE, Note, emit
from keye.media.options import DEFAULTS, MediaOptions
from keye.media.plan import VideoPlan, make_plan
from keye.media.shown import picture_fields, picture_notes, shown, size_notes
from keye.media.source.fetch import Reference, check_video, fetch_source

#: Containers whose declared duration is when they end, which may begin later than at 0, and not how long they are.
_COUNTED_FROM_ZERO = frozenset({"matroska,webm", "nut", "asf"})
#: Formats that declare no duration: it is estimated from the file's last times or its size.
_ESTIMATED = frozenset({"mpeg", "mpegts", "mpegvideo", "h264", "hevc", "m4v", "vc1"})
#: The format of pictures that follow one another without times.
_PICTURES_ALONE = "mjpeg"
#: Seconds by which the declared end may lie after what can be read of files that do not tell whether bytes are missing.
_UNSURE = 2.0
#: Times that a note lists.
_LISTED = 5
#: Longest description of a file, in bytes, without its frames' times.
_MAX_FACTS = 1 << 16


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file. `width` and `height` are those of the picture as players show it: with square pixels,
    and upright, after `rotation` (degrees counter-clockwise) and, if `mirrored`, mirroring left to right.

    `pts` are the presentation times of all frames that can be shown, ascending, in units of `time_base` seconds;
    `container_start` is the second among them at which the clock of players begins, None: with the first frame.
    `exact_times` is false when the container has none and frames were counted. `fps` is the average rate,
    `declared_fps` what the container says of it. `last_duration` is how long the last frame is shown, in units of
    `time_base`, where the container tells. `notes` say where what is read differs from what the container declares;
    every plan passes them on.
    `stored_size` is the upright (width, height) of a file whose pixels are not square, as they are stored. `transfer`
    is "sdr", "pq" or "hlg". `track` is the number of the video track that is read, `tracks` has all of them in words.
    `damage` are intervals, in seconds as players show them, in which packets are known to lack parts; `ends_early` says
    whether bytes are known to be missing at the end.
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
    notes: tuple[Note, ...] = ()
    container_start: float | None = None
    declared_fps: float | None = None
    mirrored: bool = False
    stored_size: tuple[int, int] | None = None
    transfer: str = "sdr"
    track: int = 1
    tracks: tuple[str, ...] = ()
    damage: tuple[tuple[float, float], ...] = ()
    ends_early: bool = False

    @property
    def frame_count(self) -> int:
        return len(self.pts)

    @property
    def start_offset(self) -> float:
        """When players show the first frame, in seconds: later than 0 where sound begins first."""
        if self.container_start is None:
            return 0.0
        # Containers' starts are rounded to microseconds.
        return max(round(float(self.pts[0] * self.time_base) - self.container_start, 5), 0.0)

    @cached_property
    def timestamps(self) -> tuple[float, ...]:
        """When players show each frame, in seconds."""
        return self.seconds(self.pts)

    def seconds(self, pts: Iterable[int]) -> tuple[float, ...]:
        """When players show what is presented at these times."""
        numerator, denominator = self.time_base.as_integer_ratio()
        first, offset = self.pts[0], self.start_offset
        if offset:
            return tuple(round(offset + (p - first) * numerator / denominator, 6) for p in pts)
        return tuple((p - first) * numerator / denominator for p in pts)

    @property
    def duration(self) -> float:
        """When the last frame ends, in seconds: it lasts as long as the container says, else an average frame."""
        last = 1 / self.fps if self.last_duration is None else float(self.last_duration * self.time_base)
        return self.timestamps[-1] + last

    @property
    def cut_short(self) -> bool:
        """Whether the file declares clearly more than can be read from it."""
        return self.declared_duration is not None and self.declared_duration > self.duration

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "format": self.format, "codec": self.codec, "width": self.width, "height": self.height,
            "rotation": self.rotation, "mirrored": self.mirrored, "stored_size": self.stored_size,
            "transfer": self.transfer, "track": self.track, "tracks": list(self.tracks), "fps": self.fps,
            "frame_count": self.frame_count, "duration": self.duration,
            "start_offset": self.start_offset, "exact_times": self.exact_times, "constant_rate": self.constant_rate,
            "cut_short": self.cut_short, "damage": [list(place) for place in self.damage],
            "notes": [str(note) for note in self.notes],
        }  # fmt: skip


class VideoReader:
    """An open video with its worker process. Use as a context manager; closing kills the worker.

    Without `limits`, those of strangers (`workers.STRANGERS`) hold for an untrusted source. Raises `MediaError` on
    opening when the file is no readable video or breaks a limit; without `wait`, when its facts or frames are read.
    """

    def __init__(
        self, source: Reference, limits: DecodeLimits | None = None, *, track: int | None = None, wait: bool = True
    ) -> None:
        source = fetch_source(source, max_bytes=(limits or DecodeLimits()).file_bytes)
        self.limits = limits or (STRANGERS if source.untrusted else DecodeLimits())
        self.source = fetch_source(source, max_bytes=self.limits.file_bytes)
        check_video(source)
        self._worker = self._start(track)
        #: How many times frames were asked for, and the bytes of each frame that may still come.
        self._asked = self._coming = 0
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
        self._worker.close()

    def stop(self) -> None:
        """Kills the worker; whoever reads from it in another thread gets an error, and closes."""
        self._worker.stop()

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
        self._drop_coming()
        self._asked, self._coming = self._asked + 1, height * width * 3
        number = self._asked
        self._worker.request({"targets": plan.pts, "width": width, "height": height, "deinterlace": plan.deinterlace,
                              "strict": plan.strict_media})  # fmt: skip
        for _ in range(plan.frames):
            if number != self._asked:
                raise KeyeError("frames of another plan were asked for meanwhile; read one plan after the other")
            kind, body = self._worker.receive(self._coming)
            if kind != FRAME or len(body) != self._coming:
                raise self._worker.broken()
            frame = np.frombuffer(body, dtype=np.uint8).reshape(height, width, 3)
            yield shown(frame, plan)
        if number == self._asked:
            self._end(plan.name)

    def _end(self, name: str) -> None:
        """Reads the end of an answer, and warns of frames that turned out to be damaged or of another size."""
        kind, body = self._worker.receive(_MAX_FACTS)
        self._coming = 0
        try:
            found = json.loads(bytes(body))
            damaged = array("q", found["damaged"])
            sizes = [tuple(array("q", change)) for change in found["resized"]]
            resized = list(size_notes(self.info, [(time, width, height) for time, width, height in sizes]))
        except (ValueError, TypeError, LookupError, OverflowError):
            raise self._worker.broken() from None
        if kind != END:
            raise self._worker.broken()
        if (warning := decoded_damage(name, self.info.seconds(damaged), self.info.damage)) is not None:
            warn(warning, stacklevel=3)
        emit(name, resized, stacklevel=3)

    def _drop_coming(self) -> None:
        """Has the worker give up frames that were asked for and not read."""
        if self._coming:
            self._worker.request({})
            while self._worker.receive(max(self._coming, _MAX_FACTS))[0] == FRAME:
                continue
            self._coming = 0

    def read(self, plan: VideoPlan) -> NDArray[np.uint8]:
        """All planned frames, uint8 RGB [frames, height, width, 3]."""
        frames = np.empty((plan.frames, plan.height, plan.width, 3), dtype=np.uint8)
        for i, frame in enumerate(self.frames(plan)):
            frames[i] = frame
        return frames

    def _start(self, track: int | None) -> Worker:
        limits = self.limits
        options = {
            "threads": limits.threads, "pixel_limit": limits.frame_pixels, "frame_limit": limits.frames,
            "common_only": self.source.untrusted, "track": track,
            "animation": is_png_or_webp(self.source.head()),
        }  # fmt: skip
        with self.source.open_file() as file:
            return Worker(
                "keye.media.decode.video_worker",
                file,
                options,
                limits,
                name=self.source.name,
                what="video decoder",
                untrusted=self.source.untrusted,
            )

    def _read_info(self) -> VideoInfo:
        kind, body = self._worker.receive(_MAX_FACTS + 8 * self.limits.frames)
        try:
            info = _parse_info(self.source.name, kind, body)
        except (ValueError, TypeError, LookupError, ArithmeticError, struct.error):
            # Our own worker sends none such, but one that a file has taken over may.
            raise self._worker.broken() from None
        if info.duration > self.limits.duration:
            raise MediaError(
                f"{self.source.name} lasts {info.duration:.0f} s, more than the limit of {self.limits.duration:g} s; "
                "cut it into parts"
            )
        return info


def open_video(source: Reference, limits: DecodeLimits | None = None, *, track: int | None = None) -> VideoReader:
    """Opens a video for planning and reading with one worker process: its video track `track`, counted from 1, or the
    one that players choose."""
    return VideoReader(source, limits, track=track)


def probe(source: Reference, limits: DecodeLimits | None = None, *, track: int | None = None) -> VideoInfo:
    """Facts about a video file; reads all packets, decodes one frame."""
    with VideoReader(source, limits, track=track) as reader:
        return reader.info


def plan_video(
    source: Reference, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, limits: DecodeLimits | None = None
) -> VideoPlan:
    """Which frames would be sampled from a video and what they would cost.

    Raises `MediaError` for a file that cannot be used, `KeyeError` for options that contradict the video.
    """
    with VideoReader(source, limits, track=options.track) as reader:
        return reader.plan(config, options)


def iter_frames(
    plan: VideoPlan, source: Reference, *, limits: DecodeLimits | None = None
) -> Generator[NDArray[np.uint8], None, None]:
    """The planned frames one by one, uint8 RGB [height, width, 3]. Closing the generator ends the worker."""
    with VideoReader(source, limits, track=plan.track) as reader:
        yield from reader.frames(plan)


def read_frames(plan: VideoPlan, source: Reference, *, limits: DecodeLimits | None = None) -> NDArray[np.uint8]:
    """All planned frames, uint8 RGB [frames, height, width, 3]."""
    with VideoReader(source, limits, track=plan.track) as reader:
        return reader.read(plan)


def _parse_info(name: str, kind: bytes, body: bytearray) -> VideoInfo:
    """The facts in an INFO message; `ValueError` and its like where they cannot be."""
    if kind != INFO:
        raise ValueError("no INFO message")
    (length,) = struct.unpack_from("<Q", body)
    facts = json.loads(bytes(body[8 : 8 + length]))
    times = array("q")
    times.frombytes(body[8 + length :])
    known = min(facts["width"], facts["height"]) >= 1 and math.isfinite(facts["container_start"])
    if not known or any(a >= b for a, b in itertools.pairwise(times)):
        raise ValueError("impossible facts")
    return _info(name, facts, tuple(times))


def _info(name: str, facts: dict[str, Any], pts: tuple[int, ...]) -> VideoInfo:
    time_base = Fraction(*facts["time_base"])
    fps, constant = _frame_rate(pts, time_base, facts["rate"])
    start = facts["container_start"] if facts["known_times"] else None
    declared = None if facts["format"] in _ESTIMATED else facts["declared_end"]
    if declared is not None and facts["format"] in _COUNTED_FROM_ZERO:
        declared -= max(facts["container_start"], 0.0)
    # Sound may outlast the pictures; the file is cut only where every stream ends before what it declares. Where bytes
    # are not known to be missing, what it declares may be that of a whole of which it is a complete piece.
    early = facts.get("ends_early")
    if declared is not None and early and facts["rate"] and facts["declared_frames"]:
        # Of an AVI without its index FFmpeg tells the length of what is there.
        declared = max(declared, facts["container_start"] + facts["declared_frames"] / Fraction(*facts["rate"]))
    slack = max(0.5 if early else _UNSURE, 2 / fps)
    end = max(facts["readable_end"], float(pts[-1] * time_base) + 1 / fps)
    cut = declared is not None and early is not False and declared - end > slack
    info = VideoInfo(
        name=name,
        format=facts["format"],
        codec=facts["codec"],
        **picture_fields(facts),
        fps=fps,
        time_base=time_base,
        pts=pts,
        exact_times=facts["known_times"],
        constant_rate=constant,
        declared_duration=declared - facts["container_start"] if cut else None,
        last_duration=facts["last_duration"] if facts["known_times"] else None,
        container_start=start,
        declared_fps=None if not facts["rate"] else facts["rate"][0] / facts["rate"][1],
        ends_early=early is True,
    )
    told = declared is not None and facts["known_times"]
    length = declared - facts["container_start"] if told else None
    joins = [info.start_offset + float((time - pts[0]) * time_base) for time in facts.get("joins", ())]
    damage = tuple((first, last) for first, last in (info.seconds(interval) for interval in facts.get("damage", ())))
    length_notes = _notes(info, length, facts.get("declared_frames"))
    notes = *picture_notes(info, facts), *length_notes, *_joined(joins), *damage_notes(damage)
    return dataclasses.replace(info, notes=notes, damage=damage)


def _notes(info: VideoInfo, length: float | None, frames: int | None) -> Iterator[Note]:
    """Where what is read of a file differs from what the container declares: its `length` in seconds, its `frames`."""
    if info.format == _PICTURES_ALONE:
        yield Note(f"it tells no times; {info.fps:g} frames a second are assumed")
    ends = length is not None and not -max(0.5, 2 / info.fps) <= length - info.duration <= max(1.0, 0.01 * length)
    counts = frames is not None and abs(frames - info.frame_count) > max(1, 0.005 * frames)
    late = info.start_offset >= VISIBLE
    clock = "; all times count from the start of the file, as players do" if late else ""
    if ends or info.cut_short:
        declared = length if length is not None else info.declared_duration
        run = f"run from {info.start_offset:.1f} to {info.duration:.1f} s" if late else f"end at {info.duration:.1f} s"
        count = (f" and {frames:,} frames", f", {info.frame_count:,} frames") if counts else ("", "")
        yield Note(f"the file declares {declared:.1f} s{count[0]}; its pictures {run}{count[1]}{clock}")
        return
    if info.ends_early:
        yield Note(f"the file lacks bytes at its end; its pictures end at {info.duration:.1f} s")
    if counts:
        yield Note(f"the file declares {frames:,} frames; {info.frame_count:,} are shown")
    if late:
        yield Note(f"its first frame is shown at {info.start_offset:.1f} s{clock}")


def _joined(seconds: list[float]) -> Iterator[Note]:
    """Where parts of a file meet whose clocks do not go on."""
    if seconds:
        listed = ", ".join(f"{time:.1f}" for time in seconds[:_LISTED])
        more = f" and {len(seconds) - _LISTED} more" if len(seconds) > _LISTED else ""
        yield Note(
            f"its clock begins again or jumps at {listed} s{more}; what follows goes on from there without a gap"
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
