"""Hard cuts of a video, and how much changes in it when, from thumbnails of all its frames.

A cut is a frame that differs from the one before more than its neighbours do, by more than motion and light explain,
and for good: what returns to the picture before within `FLASH` seconds is a flash. Fades and dissolves are no cuts.
Memory does not grow with the video but for `Scenes.scores`, which are bounded.
"""

from __future__ import annotations

import base64
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from keye.errors import KeyeError, Option
from keye.media.decode.thumbnails import BATCH, HEIGHT, WIDTH
from keye.media.info import VideoInfo
from keye.media.pixels.change import mean_changes, unexplained_change
from keye.media.pixels.patches import Pixels
from keye.media.source.fetch import Reference
from keye.media.video import DecodeLimits, VideoReader
from keye.moments import OnCut

#: Share of the picture that must be new at a cut, 0 to 1.
THRESHOLD: Final = 0.5
#: Seconds within which the picture before comes back after a flash; shorter shots between two alike count as flashes.
FLASH: Final = 0.3
#: Seconds by which the border of an interval may be off a cut that it is moved to.
SNAP: Final = 0.3
#: Seconds between scores of change, and the most of them: of longer videos each stands for more seconds.
STEP: Final = 0.1
MOST_SCORES: Final = 1_000_000
#: Mean difference (0..1) below which a frame is not looked at closely.
_LEAST_CHANGE: Final = 1.5 / 255
#: A cut differs so many times more than the frames beside it; where frames are further apart than `_STILL` seconds they
#: are held pictures, and not compared.
_PEAK, _STILL = 1.4, 0.5
#: A share of new picture below which two frames show the same one.
_SAME: Final = 0.3
#: Cuts are at least so many seconds apart: a cut with a flash on it is one.
_APART: Final = 0.1
#: Frames that are compared with the one before a flash, at most.
_MOST_RETURNS: Final = 12


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
        self._cuts: list[float] = []
        #: Thumbnails of frames `_first`, `_first` + 1, ... and the change of each from the one before.
        self._recent = np.empty((0, HEIGHT, WIDTH, 3), dtype=np.uint8)
        self._changes = np.empty(0, dtype=np.float32)
        self._first = self._judged = 0

    @property
    def seen(self) -> int:
        """Frames that have come."""
        return self._first + len(self._recent)

    @property
    def cuts(self) -> Sequence[float]:
        """The cuts so far, in seconds."""
        return tuple(self._cuts)

    def push(self, thumbnails: Pixels) -> None:
        """The next frames, uint8 RGB [frames, 36, 64, 3]."""
        number = self.seen
        previous = self._recent[-1:] if len(self._recent) else thumbnails[:1]
        changes = mean_changes(np.concatenate([previous, thumbnails]))
        bins = ((np.array(self._times[number : number + len(changes)]) - self._times[0]) / self._step).astype(np.int64)
        np.maximum.at(self._scores, np.minimum(bins, len(self._scores) - 1), changes.astype(np.float16))
        self._recent = np.concatenate([self._recent, thumbnails])
        self._changes = np.concatenate([self._changes, changes])
        self._judge(final=False)
        self._forget()
        if self._on_progress is not None:
            self._on_progress(self.seen, len(self.frames))

    def finish(self) -> Scenes:
        """The scenes of the frames that have come."""
        self._judge(final=True)
        cuts = list[float]()
        complete = self.seen == len(self.frames)
        end = self._end if complete else self._times[max(self.seen - 1, 0)]
        for cut in self._cuts:
            if cut - (cuts[-1] if cuts else self._times[0]) >= self.min_length:
                cuts.append(cut)
        if cuts and end - cuts[-1] < self.min_length:
            cuts.pop()
        return Scenes(self._times[0], end, tuple(cuts), self._step, self._scores)

    def _judge(self, *, final: bool) -> None:
        """Decides about all frames after which enough others have come."""
        while self._judged < self.seen:
            number = self._judged
            horizon = self._times[number] + FLASH
            if not final and (self.seen < number + 4 or self._times[self.seen - 1] <= horizon):
                return
            self._judged += 1
            if number and self._is_peak(number) and self._is_cut(number):
                self._cuts.append(self._times[number])

    def _change(self, number: int) -> float:
        """The change of a frame, 0 where it is not to be compared: beyond the ends, or after a held picture."""
        if not max(self._first, 1) <= number < self.seen or self._times[number] - self._times[number - 1] > _STILL:
            return 0.0
        return float(self._changes[number - self._first])

    def _is_peak(self, number: int) -> bool:
        """Whether a frame changes more than those beside it, or together with the next one, as where the cut lies
        inside a frame, which shows both shots."""
        change = float(self._changes[number - self._first])
        if change < _LEAST_CHANGE:
            return False
        before, after = self._change(number - 1), self._change(number + 1)
        if change >= _PEAK * max(before, after):
            return True
        outside = max(before, self._change(number + 2))
        return number + 1 < self.seen and min(change, after) >= 2 * _PEAK * outside

    def _is_cut(self, number: int) -> bool:
        """Whether what a frame shows, or the next one where the cut lies inside it, is new and stays."""
        change, after = float(self._changes[number - self._first]), self._change(number + 1)
        inside = change < _PEAK * after
        place = number + 1 if inside else number
        if self._cuts and self._times[number] - self._cuts[-1] < _APART:
            return False
        share = self._unexplained(number - 1, place)
        if share < self.threshold or self._returns(number - 1, place):
            return False
        around = [n for n in (number - 3, number - 2, number + 2, number + 3) if max(self._first, 1) <= n < self.seen]
        restless = [n for n in around if self._change(n) > change / 3]
        # Where every picture is new, as in noise, another is not a cut.
        return len(restless) < 2 or share > 1.3 * max(self._unexplained(n - 1, n) for n in restless)

    def _returns(self, before: int, number: int) -> bool:
        """Whether the picture of frame `before` comes back soon after `number`, or that of `number` was there soon
        before: a flash begins or ends."""
        after = self._near(range(number + 1, self.seen), self._times[number])
        earlier = self._near(range(before - 1, self._first - 1, -1), self._times[before])
        return any(self._unexplained(before, n) < _SAME for n in after) or any(
            self._unexplained(n, number) < _SAME for n in earlier
        )

    def _near(self, numbers: range, time: float) -> list[int]:
        """Those of consecutive frames that lie within `FLASH` seconds of a time, at most `_MOST_RETURNS`."""
        near = list[int]()
        for n in numbers:
            if abs(self._times[n] - time) > FLASH:
                break
            near.append(n)
        return near[:: -(-len(near) // _MOST_RETURNS)] if near else near

    def _unexplained(self, before: int, number: int) -> float:
        return unexplained_change(self._recent[before - self._first], self._recent[number - self._first])

    def _forget(self) -> None:
        """Drops what no later frame is compared with."""
        oldest = min(bisect_left(self._times, self._times[min(self._judged, len(self._times) - 1)] - 2 * FLASH),
                     self._judged - 4)  # fmt: skip
        if oldest - self._first >= BATCH:
            self._recent, self._changes = self._recent[oldest - self._first :], self._changes[oldest - self._first :]
            self._first = oldest


def find_scenes(
    source: Reference, *, track: int | None = None, threshold: float = THRESHOLD, min_length: float = 0.0,
    limits: DecodeLimits | None = None, on_progress: Callable[[int, int], None] | None = None,
) -> Scenes:  # fmt: skip
    """The scenes of a video file, all frames of which are decoded; options are those of `SceneScan`."""
    with VideoReader(source, limits, track=track) as reader:
        scan = SceneScan(reader.info, threshold=threshold, min_length=min_length, on_progress=on_progress)
        reader.scan(scan)
        return scan.finish()


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
