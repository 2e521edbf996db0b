"""What is exported: ranges of videos, and where they fall in whole frames on the timeline of an editing program.

Rounding: start and end go to the nearest frame, and a range has at least one frame, so that a moment never vanishes.
Frames of a medium are counted from its first picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np

from keye.errors import KeyeError
from keye.exports.rate import DROPPING, FrameRate, editing_rate, is_drop_frame, parse_rate, snap
from keye.media.info import VideoInfo
from keye.moments import Moment

Mode = Literal["sequence", "markers"]
#: Rates measured by the middle interval of frames are this close, as a share, to the standard rate that is meant.
_ROUGHLY = 0.02
#: Where sequences begin unless something else is asked for: the custom of programs that cut.
_FIRST_HOUR = "01:00:00:00"
_MOST_HANDLE = 3600.0


@dataclass(frozen=True)
class ExportRange:
    """Seconds of a video, as players show them, with what is to be said of them. `file` names the medium where there
    are several."""

    start: float
    end: float
    label: str
    probability: float | None = None
    note: str = ""
    file: str | None = None

    @property
    def comment(self) -> str:
        """Probability and note in a few words."""
        percent = None if self.probability is None else f"{self.probability:.0%}"
        return ", ".join(part for part in (percent, self.note) if part)


def ranges_of(moments: Iterable[Moment], label: str) -> list[ExportRange]:
    """The ranges of what a search has found, in the moments' order."""
    ranges = []
    for moment in moments:
        words = {"twice": "checked twice", "failed": "did not pass the check", "no": ""}[moment.checked]
        quoted = f'"{moment.subtitle.text}"' if moment.subtitle is not None else ""
        note = ", ".join(part for part in (words, quoted) if part)
        ranges.append(ExportRange(moment.start, moment.end, label, moment.probability, note, moment.file))
    return ranges


@dataclass(frozen=True)
class MediaReference:
    """A video file as edit lists name it.

    `rate` is nominal: of a file of variable rate that of most of its frames. `offset` is when players show the first
    picture, `duration` when the last one ends, both in seconds. `timecode` is the label of the first frame, None where
    the file has none. `channels` and `sample_rate` are those of its sound, 0 without.
    """

    name: str
    url: str
    width: int
    height: int
    rate: Fraction
    duration: float
    offset: float = 0.0
    is_variable: bool = False
    timecode: str | None = None
    stored_width: int | None = None
    channels: int = 0
    sample_rate: int = 0

    @classmethod
    def of(cls, info: VideoInfo, place: Path | str | None = None, name: str | None = None) -> MediaReference:
        """The reference to a file that was opened, which lies at `place`: a path or an address. Without one the edit
        list names the file alone."""
        name = name or (place.name if isinstance(place, Path) else info.name)
        url = place.absolute().as_uri() if isinstance(place, Path) else place or quote(name)
        sound = info.sound
        return cls(
            name, url, info.width, info.height, nominal_rate(info), info.duration, info.start_offset,
            not info.constant_rate, info.timecode, info.stored_size[0] if info.stored_size else None,
            sound.channels if sound is not None else 0, sound.rate if sound is not None else 0,
        )  # fmt: skip

    def frames(self, rate: FrameRate) -> int:
        """Its length at a rate."""
        return max(1, rate.nearest(self.duration - self.offset))

    def first_frame(self, rate: FrameRate) -> int:
        """The frame that the timecode of its first picture stands for, at a rate; 0 without timecode."""
        if self.timecode is None:
            return 0
        return rate.frame_of(self.timecode, FrameRate(self.rate).base)


def nominal_rate(info: VideoInfo) -> Fraction:
    """Frames a second of a file; of one with a variable rate that of its middle interval between frames."""
    if info.constant_rate or info.frame_count < 3:
        return snap(info.fps)
    middle = float(np.median(np.diff(np.asarray(info.pts))) * info.time_base)
    return snap(1 / middle, _ROUGHLY)


@dataclass(frozen=True)
class ExportOptions:
    """How ranges become a timeline.

    `rate` is one that `parse_rate` reads, by default that of the first file. `start_timecode` is the label of the
    sequence's first frame. `handles` are seconds shown before and after each range, as far as the file has them.
    `mode`: the ranges as clips behind one another, or as markers on the whole video.
    """

    rate: str | None = None
    start_timecode: str | None = None
    handles: tuple[float, float] = (0.0, 0.0)
    mode: Mode = "sequence"

    def __post_init__(self) -> None:
        if not all(0 <= seconds <= _MOST_HANDLE for seconds in self.handles):
            raise KeyeError(f"handles are {self.handles}: give seconds from 0 to {_MOST_HANDLE:g}")
        if self.mode not in ("sequence", "markers"):
            raise KeyeError(f"mode is {self.mode!r}: give sequence or markers")
        if self.rate is not None:
            parse_rate(self.rate)


@dataclass(frozen=True)
class Event:
    """A range in whole frames: `first` to before `end` in the medium, with handles `source_first` to before
    `source_end`, which lie from `record` on in the sequence. `begin` and `stop` are the times that were rounded."""

    number: int
    range: ExportRange
    media: MediaReference
    begin: float
    stop: float
    first: int
    end: int
    source_first: int
    source_end: int
    record: int

    @property
    def frames(self) -> int:
        """The length in the sequence."""
        return self.source_end - self.source_first

    @property
    def text(self) -> str:
        """Label and comment on one line."""
        return " - ".join(part for part in (self.range.label, self.range.comment) if part)


@dataclass(frozen=True)
class Cut:
    """The timeline that every format writes: events in the order of time, file after file. `start` is the frame of the
    sequence's first label; `rounding_ms` how far a border is from the answer at most. `notes` are sentences."""

    title: str
    rate: FrameRate
    start: int
    mode: Mode
    media: tuple[MediaReference, ...]
    events: tuple[Event, ...]
    rounding_ms: int
    notes: tuple[str, ...] = field(default=())

    @property
    def frames(self) -> int:
        """The length of the sequence: all events, or with markers the video."""
        if self.mode == "markers":
            return self.media[0].frames(self.rate)
        return sum(event.frames for event in self.events)

    def number_of(self, media: MediaReference) -> int:
        """The number of a medium, from 1."""
        return self.media.index(media) + 1

    def source_timecode(self, media: MediaReference, frame: int) -> str:
        """The label of a medium's frame."""
        return self.rate.timecode(media.first_frame(self.rate) + frame)


def lay_out(
    ranges: Sequence[ExportRange], media: MediaReference | Mapping[str, MediaReference], options: ExportOptions,
    title: str,
) -> Cut:  # fmt: skip
    """Places ranges on a timeline. `media` is the video, or those that `ExportRange.file` names. Ranges outside a video
    are left out, and a note says so. `KeyeError` where the options contradict the files."""
    files = _group(ranges, media)
    main = next(iter(files), None) or (media if isinstance(media, MediaReference) else next(iter(media.values())))
    rate, notes = _choose_rate(main, options)
    if options.mode == "markers" and len(files) > 1:
        raise KeyeError("markers belong to one video and the moments are of several: choose clips in a sequence")
    events: list[Event] = []
    record, left_out = 0, 0
    for file, listed in files.items():
        for item in sorted(listed, key=lambda item: (item.start, item.end)):
            begin, stop = max(item.start, file.offset), min(item.end, file.duration)
            if item.start >= file.duration or item.end < file.offset:
                left_out += 1
                continue
            event = _place(len(events) + 1, item, file, begin, max(begin, stop), rate, options, record)
            events.append(event)
            record += event.frames
    if left_out:
        notes.append(f"{left_out} of {len(ranges)} moments lie outside the video and are left out")
    if options.mode == "markers" and any(options.handles):
        notes.append("handles have no effect on markers")
    rounding = _rounding(events, rate)
    notes.insert(0, f"Times fall on whole frames: at most {rounding} ms from the answer.")
    return Cut(title, rate, _start_frame(main, rate, options), options.mode, tuple(files) or (main,), tuple(events),
               rounding, tuple(notes))  # fmt: skip


def _group(
    ranges: Sequence[ExportRange], media: MediaReference | Mapping[str, MediaReference]
) -> dict[MediaReference, list[ExportRange]]:
    files: dict[MediaReference, list[ExportRange]] = {}
    for item in ranges:
        if not (math.isfinite(item.start) and math.isfinite(item.end) and item.start <= item.end):
            raise KeyeError(
                f"a moment from {item.start} to {item.end} s cannot be exported: its end is before its start"
            )
        if isinstance(media, MediaReference):
            file: MediaReference | None = media
        else:
            file = media.get(item.file or "") or (next(iter(media.values())) if len(media) == 1 else None)
        if file is None:
            raise KeyeError(f"a moment is of {item.file!r}, which is none of the videos that are exported")
        files.setdefault(file, []).append(item)
    return files


def _choose_rate(main: MediaReference, options: ExportOptions) -> tuple[FrameRate, list[str]]:
    """The rate of the timeline, and notes on how it came about."""
    drop = None if main.timecode is None else is_drop_frame(main.timecode)
    if options.rate is not None:
        return parse_rate(options.rate, drop_frame=drop), []
    value = editing_rate(main.rate)
    rate = FrameRate(value, value in DROPPING and drop is not False)
    if main.is_variable:
        return rate, [f"{main.name} has a variable frame rate: times are written at {rate}"]
    if value != main.rate:
        own = f"{main.name} has {float(main.rate):.4g} frames a second, which editing programs do not know"
        return rate, [f"{own}: times are written at {rate}"]
    return rate, []


def _place(
    number: int, item: ExportRange, file: MediaReference, begin: float, stop: float, rate: FrameRate,
    options: ExportOptions, record: int,
) -> Event:  # fmt: skip
    total = file.frames(rate)
    first = min(rate.nearest(begin - file.offset), total - 1)
    end = min(max(rate.nearest(stop - file.offset), first + 1), total)
    before, after = (0, 0) if options.mode == "markers" else (rate.nearest(seconds) for seconds in options.handles)
    source_first, source_end = max(0, first - before), min(total, end + after)
    return Event(number, item, file, begin, stop, first, end, source_first, source_end,
                 first if options.mode == "markers" else record)  # fmt: skip


def _rounding(events: Sequence[Event], rate: FrameRate) -> int:
    """Milliseconds, rounded up, that no border is further away from its time than."""
    most = rate.half_frame_ms
    for event in events:
        for frame, time in ((event.first, event.begin), (event.end, event.stop)):
            away = abs(float(rate.seconds(frame)) + event.media.offset - time)
            most = max(most, 1000 * away - 1e-3)
    return math.ceil(most)


def _start_frame(main: MediaReference, rate: FrameRate, options: ExportOptions) -> int:
    """Clips are laid from the first hour on; the whole video with markers keeps its own timecode."""
    if options.start_timecode is not None:
        return rate.frame_of(options.start_timecode)
    return main.first_frame(rate) if options.mode == "markers" else rate.frame_of(_FIRST_HOUR)
