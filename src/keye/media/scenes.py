"""Hard cuts of a video, and how much changes in it when, from thumbnails of all its frames.

`keye.media.pixels.cuts` finds the cuts. Memory does not grow with the video but for `Scenes.scores`, which are bounded.
"""

from __future__ import annotations

import base64
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from keye.config.media import MediaOptions
from keye.errors import KeyeError, Option
from keye.media.info import VideoInfo
from keye.media.pixels.cuts import THRESHOLD, CutDetector
from keye.media.pixels.patches import Pixels
from keye.media.plan import VideoPlan
from keye.media.source.fetch import Reference, fetch_source
from keye.media.video import DecodeLimits, VideoReader
from keye.moments import OnCut

#: Seconds by which the border of an interval may be off a cut that it is moved to.
SNAP: Final = 0.3
#: Seconds between scores of change, and the most of them: of longer videos each stands for more seconds.
STEP: Final = 0.1
MOST_SCORES: Final = 1_000_000
#: Processor seconds for decoding all frames of a user's own file.
_CPU_SECONDS: Final = 7 * 24 * 3600


@dataclass(frozen=True)
class Shot:
    """What one camera shows between two hard cuts, in seconds."""

    start: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Scenes:
    """The hard cuts of a video between `start` and `end`: `cuts` are the seconds at which a new shot begins.

    `scores` (float16) are the largest changes between two frames, as mean difference of levels in 0..1, in each `step`
    seconds from `start` on.
    """

    start: float
    end: float
    cuts: tuple[float, ...]
    step: float
    scores: NDArray[np.float16]

    @property
    def shots(self) -> list[Shot]:
        """The parts between cuts, in order."""
        return [Shot(a, b) for a, b in pairwise((self.start, *self.cuts, self.end))]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; scores as base64 of little-endian float16."""
        scores = base64.b64encode(self.scores.astype("<f2").tobytes()).decode()
        return {"start": self.start, "end": self.end, "cuts": list(self.cuts), "step": self.step, "scores": scores}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scenes:
        """What `to_dict` gave. Raises `ValueError` and its like for anything else."""
        scores = np.frombuffer(base64.b64decode(data["scores"], validate=True), "<f2").astype(np.float16)
        start, end, step = float(data["start"]), float(data["end"]), float(data["step"])
        cuts = tuple(float(cut) for cut in data["cuts"])
        if len(scores) > MOST_SCORES or not start <= end or not step > 0 or list(cuts) != sorted(set(cuts)):
            raise ValueError("impossible scenes")
        return cls(start, end, cuts, step, scores)


class SceneScan:
    """Finds the cuts among `frames` of a video from their thumbnails: a `keye.media.video.FrameScan`.

    `threshold` is the share of the picture that must be new at a cut; shots shorter than `min_length` seconds are
    joined with the one before. `on_progress` is called with (frames seen, frames in all).
    """

    def __init__(
        self, info: VideoInfo, frames: range | None = None, *, threshold: float = THRESHOLD, min_length: float = 0.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        if not 0 < threshold < 1:
            raise KeyeError("{} must be between 0 and 1, the share of the picture that is new", Option("threshold"))
        if not 0 <= min_length < float("inf"):
            raise KeyeError("{} must be a number of seconds, 0 or more", Option("min_length"))
        self.frames = range(info.frame_count) if frames is None else frames
        if not self.frames or self.frames.step != 1 or self.frames[-1] >= info.frame_count or self.frames[0] < 0:
            raise KeyeError(f"frames to scan must be consecutive ones of the {info.frame_count} of {info.name}")
        self.threshold, self.min_length, self._on_progress = threshold, min_length, on_progress
        self._times = info.timestamps[self.frames.start : self.frames.stop]
        last = self.frames.stop == info.frame_count
        self._end = info.duration if last else info.timestamps[self.frames.stop]
        self._step = max(STEP, (self._end - self._times[0]) / MOST_SCORES)
        self._scores = np.zeros(int((self._times[-1] - self._times[0]) / self._step) + 1, dtype=np.float16)
        self._detector = CutDetector(self._times, threshold)

    @property
    def seen(self) -> int:
        """Frames that have come."""
        return self._detector.seen

    @property
    def cuts(self) -> Sequence[float]:
        """The cuts so far, in seconds."""
        return tuple(self._detector.cuts)

    def push(self, thumbnails: Pixels) -> None:
        """The next frames, uint8 RGB [frames, 18, 32, 3]."""
        number = self.seen
        changes = self._detector.push(thumbnails)
        times = np.array(self._times[number : number + len(changes)])
        bins = np.minimum((times - self._times[0]) / self._step, len(self._scores) - 1).astype(np.int64)
        np.maximum.at(self._scores, bins, changes.astype(np.float16))
        if self._on_progress is not None:
            self._on_progress(self.seen, len(self.frames))

    def finish(self) -> Scenes:
        """The scenes of the frames that have come."""
        self._detector.finish()
        cuts, start = list[float](), self._times[0]
        end = self._end if self.seen == len(self.frames) else self._times[max(self.seen - 1, 0)]
        for cut in self._detector.cuts:
            if cut - (cuts[-1] if cuts else start) >= self.min_length:
                cuts.append(cut)
        if cuts and end - cuts[-1] < self.min_length:
            cuts.pop()
        return Scenes(start, end, tuple(cuts), self._step, self._scores)


def find_scenes(
    video: Reference, *, track: int | None = None, threshold: float = THRESHOLD, min_length: float = 0.0,
    limits: DecodeLimits | None = None, on_progress: Callable[[int, int], None] | None = None,
) -> Scenes:  # fmt: skip
    """The hard cuts of a video (a path, an address, bytes or a `Source`) and the scenes between them. All frames are
    decoded, which needs no model. Options are those of `SceneScan`; `track` is the video track that is read. Raises
    `MediaError` for a file that cannot be read."""
    source = fetch_source(video)
    if limits is None and not source.untrusted:  # all frames of many hours may be read, as long as the user waits
        limits = DecodeLimits(cpu_seconds=_CPU_SECONDS)
    with VideoReader(source, limits, track=track) as reader:
        scan = SceneScan(reader.info, threshold=threshold, min_length=min_length, on_progress=on_progress)
        reader.scan(scan)
        return scan.finish()


def middle_frames(video: Reference, scenes: Scenes, *, most_pixels: int, track: int | None = None) -> Iterator[Pixels]:
    """A picture of each shot, from its middle, upright, uint8 RGB [height, width, 3] of at most `most_pixels`."""
    with VideoReader(video, track=track) as reader:
        times, info = reader.info.timestamps, reader.info
        places = [bisect_right(times, (shot.start + shot.end) / 2) - 1 for shot in scenes.shots]
        scale = min(1.0, (most_pixels / (info.width * info.height)) ** 0.5)
        size = max(1, int(info.height * scale)), max(1, int(info.width * scale))
        looks = MediaOptions(tone_map=True)
        yield from reader.frames(VideoPlan.of(info, places, size, tokens_per_frame=0, rate=info.fps, options=looks))


def snap(
    interval: tuple[float, float], cuts: Sequence[float], tolerance: float = SNAP
) -> tuple[float, float, OnCut | None]:
    """The interval (start, end) in seconds with borders moved to the nearest of ascending `cuts` within `tolerance`,
    and which of them lie on one. A border stays where the interval would be empty otherwise."""
    start, end = (_nearest(time, cuts, tolerance) for time in interval)
    if start is not None and end is not None and start >= end:  # one short interval at one cut: the nearer border moves
        start, end = (start, None) if abs(start - interval[0]) <= abs(end - interval[1]) else (None, end)
    new = (interval[0] if start is None else start, interval[1] if end is None else end)
    if new[0] >= new[1]:
        return (*interval, None)
    on_cut: OnCut | None = {(True, True): "both", (True, False): "start", (False, True): "end"}.get(  # type: ignore[assignment]
        (start is not None, end is not None)
    )
    return (*new, on_cut)


def _nearest(time: float, cuts: Sequence[float], tolerance: float) -> float | None:
    place = bisect_left(cuts, time)
    near = min(cuts[max(place - 1, 0) : place + 1], key=lambda cut: abs(cut - time), default=None)
    return near if near is not None and abs(near - time) <= tolerance else None
