"""What a request may set for one image or video, in one frozen object that every planning function takes, and what
fetching it may cost.

Knows names and ranges, not what they lead to: `sampling` and `sizes` hold the rules of each release.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keye.errors import KeyeError, Option, brief, is_number
from keye.units import GIB

MediumKind = Literal["image", "video"]

_COUNTS = ("nframes", "min_frames", "max_frames", "resized_height", "resized_width", "video_count", "track")
_AMOUNTS = ("fps", "min_pixels", "max_pixels", "video_total_pixels")
_TIMES = ("video_start", "video_end")
_SWITCHES = ("adaptive_budget", "deinterlace", "tone_map", "strict_media")
#: Least and most of the same thing.
_LIMITS = (("min_frames", "max_frames"), ("min_pixels", "max_pixels"))


#: Between what the amounts and counts of a request must lie, so that no rule of sizes or times overflows.
LEAST, MOST = 1e-9, 1e15


@dataclass(frozen=True)
class MediaOptions:
    """Settings of one medium; None leaves the configuration's value.

    fps: frames sampled per second of video; of a list of pictures, the rate at which they were taken.
    nframes: a number of frames instead of `fps`.
    min_frames, max_frames: limits on the number of frames.
    min_pixels, max_pixels: limits on the area of an image or of one frame.
    video_total_pixels: limit on the area of all frames together (Preview calls it `total_pixels`).
    resized_height, resized_width: the size itself, rounded to whole tokens; both or neither.
    video_start, video_end: the part of the video to use, in seconds; of a list, where `timestamps` or `fps` tell times.
    adaptive_budget: a single short video gets a share of the budget by its length (2.0: `Release.adaptive_shares`).
    min_frame_similarity: 1.5 only, share of similar patches below which a frame becomes a slow frame.
    track: which video track of a file, counted from 1; else the one that players choose.
    deinterlace: whether frames that the file calls interlaced are deinterlaced; else they are unless `strict_official`.
    tone_map: whether frames of high dynamic range (PQ, HLG) are made ones of standard range.
    timestamps: seconds of the pictures of a list.
    video_count: videos that share the configured budget (2.0).
    strict_media: refuse a file that is damaged or ends early, instead of reading what is there and saying so.
    strict_official: reproduce what the official code does where it ignores a documented option or fails.
    """

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: float | None = None
    max_pixels: float | None = None
    video_total_pixels: float | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    adaptive_budget: bool | None = None
    video_start: float | None = None
    video_end: float | None = None
    min_frame_similarity: float | None = None
    track: int | None = None
    deinterlace: bool | None = None
    tone_map: bool | None = None
    timestamps: tuple[float, ...] | None = None
    video_count: int = 1
    strict_media: bool = False
    strict_official: bool = False

    def __post_init__(self) -> None:
        for name in (*_AMOUNTS, *_COUNTS):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise KeyeError("{} is {}; it must be above 0", Option(name), brief(value))
            if value is not None and not LEAST <= value <= MOST:
                raise KeyeError("{} is {:g}; it must lie between {:g} and {:g}", Option(name), value, LEAST, MOST)
            if name in _COUNTS and value is not None and value != int(value):
                raise KeyeError("{} is {}; it must be a whole number", Option(name), value)
        for name in _TIMES:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and abs(value) <= MOST):
                raise KeyeError("{} is {}; give seconds", Option(name), brief(value))
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool | None):
                raise KeyeError("{} is {!r}; give true or false", Option(name), value)
        similarity = self.min_frame_similarity
        if similarity is not None and not (is_number(similarity) and 0 <= similarity <= 1):
            raise KeyeError("{} is {}; it must lie between 0 and 1", Option("min_frame_similarity"), similarity)
        if self.strict_official:
            return
        for least, most in _LIMITS:
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise KeyeError("{} is above {}; swap them or leave one out", Option(least, low), Option(most, high))
        if (self.resized_height is None) != (self.resized_width is None):
            raise KeyeError("resized_height and resized_width must be given together")
        if self.fps is not None and self.nframes is not None:
            raise KeyeError("{} and {} exclude each other; give one of them", Option("fps"), Option("nframes"))

    @property
    def deinterlaces(self) -> bool:
        """Whether interlaced frames are deinterlaced."""
        return not self.strict_official if self.deinterlace is None else self.deinterlace

    @property
    def resized(self) -> tuple[int, int] | None:
        """The requested (height, width), if both are given."""
        if self.resized_height is None or self.resized_width is None:
            return None
        return int(self.resized_height), int(self.resized_width)

    def replace(self, **changes: Any) -> MediaOptions:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


#: Nothing set.
DEFAULTS = MediaOptions()

IMAGE_OPTIONS = frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width", "strict_official"})
VIDEO_OPTIONS = frozenset(f.name for f in dataclasses.fields(MediaOptions)) - {"video_count"} | {"total_pixels"}


def media_options(kind: MediumKind, options: Mapping[str, Any], *, video_count: int = 1) -> MediaOptions:
    """The options of one medium from the keys of a message or a command; unknown keys are errors.

    `total_pixels` is another name of `video_total_pixels`. Values of None count as not given.
    """
    known = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS
    if unknown := sorted(options.keys() - known):
        raise KeyeError(f"{unknown[0]} is not an option of {kind}s; known are {', '.join(sorted(known))}")
    values = {name: value for name, value in options.items() if value is not None}
    if "total_pixels" in values:
        if "video_total_pixels" in values:
            raise KeyeError("total_pixels and video_total_pixels are the same option; give one of them")
        values["video_total_pixels"] = values.pop("total_pixels")
    if "timestamps" in values:
        try:
            values["timestamps"] = seconds = tuple(map(float, values["timestamps"]))
        except (TypeError, ValueError, OverflowError):
            raise KeyeError("timestamps must be a list of seconds, one for each frame") from None
        if not all(map(math.isfinite, seconds)) or any(a > b for a, b in itertools.pairwise(seconds)):
            raise KeyeError("timestamps must be finite and ascending, in seconds")
    return MediaOptions(**values, video_count=video_count)


@dataclass(frozen=True)
class FetchLimits:
    """What a download may cost. `idle_seconds` is the longest silence, `total_seconds` the whole time.

    `allow_private` permits addresses that are not public: this machine, the local network, a cloud's metadata service.
    With `hosts` only those may be asked, at first and by redirect, and addresses must be written so that all programs
    read them alike (`hosts.check_address`); what they resolve to is then not reported. `private_hosts` are rules
    for those that may be at addresses that are not public. Files are saved in `folder`, else where temporary files are.
    """

    download_bytes: int = 4 * GIB
    total_seconds: float = 900.0
    idle_seconds: float = 30.0
    redirects: int = 5
    allow_private: bool = False
    hosts: tuple[str, ...] | None = None
    private_hosts: tuple[str, ...] = ()
    folder: Path | None = None
