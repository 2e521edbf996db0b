"""Facts about a video file, as the decode worker sends them: `VideoInfo`, and the notes on what is unusual in them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from keye.errors import Option
from keye.media.decode.wire import INFO
from keye.media.notes import VISIBLE, Note, note_damage

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
_TRANSFERS = ("sdr", "pq", "hlg")
_TIMECODE = re.compile(r"\d\d:[0-5]\d:[0-5]\d[:;.,]\d{2,3}")


@dataclass(frozen=True)
class Sound:
    """The sound track that players choose: codec, sample rate and channels, 0 where they are not known. `is_readable`
    says whether keye may decode it and knows where it belongs in time."""

    codec: str
    rate: int
    channels: int
    is_readable: bool


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
    whether bytes are known to be missing at the end. `timecode` is the label of the first frame, hh:mm:ss:ff, with
    ";" before the frames where it is drop-frame; `sound` is None without any.
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
    timecode: str | None = None
    sound: Sound | None = None

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


def parse_info(name: str, kind: bytes, body: bytearray) -> VideoInfo:
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
    return _build_info(name, facts, tuple(times))


def _build_info(name: str, facts: dict[str, Any], pts: tuple[int, ...]) -> VideoInfo:
    time_base = Fraction(*facts["time_base"])
    fps, constant = _find_frame_rate(pts, time_base, facts["rate"])
    container_start = facts["container_start"]
    declared = None if facts["format"] in _ESTIMATED else facts["declared_end"]
    if declared is not None and facts["format"] in _COUNTED_FROM_ZERO:
        declared -= max(container_start, 0.0)
    # Sound may outlast the pictures; the file is cut only where every stream ends before what it declares. Where bytes
    # are not known to be missing, what it declares may be that of a whole of which it is a complete piece.
    early = facts.get("ends_early")
    if declared is not None and early and facts["rate"] and facts["declared_frames"]:
        # Of an AVI without its index FFmpeg tells the length of what is there.
        declared = max(declared, container_start + facts["declared_frames"] / Fraction(*facts["rate"]))
    slack = max(0.5 if early else _UNSURE, 2 / fps)
    end = max(facts["readable_end"], float(pts[-1] * time_base) + 1 / fps)
    cut = declared is not None and early is not False and declared - end > slack
    info = VideoInfo(
        name, facts["format"], facts["codec"], **_read_picture_fields(facts),
        fps=fps, time_base=time_base, pts=pts, exact_times=facts["known_times"], constant_rate=constant,
        declared_duration=declared - container_start if cut else None,
        last_duration=facts["last_duration"] if facts["known_times"] else None,
        container_start=container_start if facts["known_times"] else None,
        declared_fps=None if not facts["rate"] else facts["rate"][0] / facts["rate"][1], ends_early=early is True,
        timecode=_read_timecode(facts.get("timecode")), sound=_read_sound(facts.get("sound")),
    )  # fmt: skip
    length = declared - container_start if declared is not None and facts["known_times"] else None
    joins = [info.start_offset + float((time - pts[0]) * time_base) for time in facts.get("joins", ())]
    damage = tuple((first, last) for first, last in (info.seconds(interval) for interval in facts.get("damage", ())))
    notes = [*_note_picture(info, facts), *_note_differences(info, length, facts.get("declared_frames"))]
    if joins:  # where parts of a file meet whose clocks do not go on
        listed = ", ".join(f"{time:.1f}" for time in joins[:_LISTED])
        more = f" and {len(joins) - _LISTED} more" if len(joins) > _LISTED else ""
        sentence = f"its clock begins again or jumps at {listed} s{more}; what follows goes on from there without a gap"
        notes.append(Note(sentence))
    return dataclasses.replace(info, notes=(*notes, *note_damage(damage)), damage=damage)


def _note_differences(info: VideoInfo, length: float | None, frames: int | None) -> Iterator[Note]:
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


def _find_frame_rate(pts: tuple[int, ...], time_base: Fraction, declared: list[int] | None) -> tuple[float, bool]:
    """Frames per second (the container's where the times bear it out) and whether frame i is shown at i / rate."""
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


def _read_picture_fields(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `VideoInfo`, from the worker's facts. Raises `ValueError` for impossible ones."""
    size, stored, tracks = tuple(facts["shown"]), (facts["width"], facts["height"]), tuple(facts["tracks"])
    if len(size) != 2 or min(*size, *stored) < 1 or facts["transfer"] not in _TRANSFERS or facts["rotation"] % 90:
        raise ValueError("impossible facts of pictures")
    if facts["aspect"] is not None and not all(isinstance(value, int) for value in facts["aspect"]):
        raise ValueError("impossible shape of pixels")
    printable = all(isinstance(track, str) and track.isprintable() for track in tracks)
    if not 1 <= facts["track"] <= len(tracks) or not printable:
        raise ValueError("impossible tracks")
    if facts["rotation"] % 180:
        size, stored = size[::-1], stored[::-1]
    return {
        "width": size[0], "height": size[1], "stored_size": None if stored == size else stored,
        "rotation": facts["rotation"] % 360, "mirrored": bool(facts["mirrored"]), "transfer": facts["transfer"],
        "track": facts["track"], "tracks": tracks,
    }  # fmt: skip


def _read_timecode(label: Any) -> str | None:
    if label is not None and not (isinstance(label, str) and _TIMECODE.fullmatch(label)):
        raise ValueError("impossible timecode")
    return label


def _read_sound(facts: Any) -> Sound | None:
    if facts is None:
        return None
    sound = Sound(facts["codec"], facts["rate"], facts["channels"], facts["readable"] is True)
    numbers = all(isinstance(number, int) and 0 <= number < 1 << 24 for number in (sound.rate, sound.channels))
    if not numbers or not isinstance(sound.codec, str) or not sound.codec.isprintable():
        raise ValueError("impossible sound")
    return sound


def _note_picture(info: VideoInfo, facts: Mapping[str, Any]) -> Iterator[Note]:
    """Where pictures are shown otherwise than the container says, or it leaves a choice."""
    if len(info.tracks) > 1 and not facts["track_asked"]:
        listed = "; ".join(info.tracks)
        yield Note(f"it has {len(info.tracks)} video tracks ({listed}); track {info.track} is read: choose with {{}}",
                   (Option("track"),))  # fmt: skip
    if not facts["exact_orientation"]:
        yield Note(f"it asks to be turned by no quarter turn; the nearest, {info.rotation} degrees, is used")
    if not facts["aspect_believed"]:
        width, height = facts["aspect"]
        yield Note(f"it says that its pixels are {width}:{height}, which cannot be; they are taken as square")


def note_size_changes(info: VideoInfo, changes: Sequence[tuple[int, int, int]]) -> Iterator[Note]:
    """The note of pictures that change their size: (time in units of the file, width, height as stored)."""
    if changes:
        times = info.seconds(time for time, _, _ in changes)
        listed = [f"{w}x{h} from {time:.1f} s on" for time, (_, w, h) in zip(times, changes, strict=True)]
        more = f" and so on, {len(listed)} changes" if len(listed) > _LISTED else ""
        yield Note(f"its pictures change their size: {', '.join(listed[:_LISTED])}{more}; all are stretched to the "
                   f"{info.width}x{info.height} of the first")  # fmt: skip
