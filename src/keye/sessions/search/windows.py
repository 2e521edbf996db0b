"""A video as windows of a few frames that overlap, each with a clock of its own.

A model that was trained on a minute of video reads two hours as windows of a minute, each a prompt by itself. Labels
of its frames count from 0 on the window's own clock: small numbers, as in training. Where frames lie closer together
than labels with one decimal can tell, that clock runs slower than the video's. What a model answers in seconds of the
clock is turned into seconds of the file by the frames between which it lies. Knows times, no pixels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.errors import KeyeError
from keye.media.sampling import SAME_TIME, find_displayed_frames, find_time_range

#: Frames closer together than this, in seconds, have labels too alike: they are labelled `_STRETCHED` apart.
LEAST_SPACING: Final = 0.2
_STRETCHED: Final = 0.5
#: Overlap of neighbouring windows: at least so many frames and so many seconds, but at most half a window.
OVERLAP_FRAMES: Final = 2
OVERLAP_SECONDS: Final = 2.0
#: Most frames of a plan: two days at one a second.
MOST_FRAMES: Final = 200_000
Times = NDArray[np.floating]


@dataclass(frozen=True)
class SearchWindow:
    """Frames of a video that are read together. `times` are their seconds on the clock of the file, ascending; `labels`
    those on the window's own; the last frame makes way at `end`. Frames were chosen about every `spacing` seconds.
    `number` counts the windows of a plan."""

    number: int
    times: tuple[float, ...]
    labels: tuple[float, ...]
    end: float
    spacing: float

    @property
    def start(self) -> float:
        """When the first frame is shown."""
        return self.times[0]

    def to_file(self, seconds: float) -> float:
        """Seconds of the file at a time of the window's clock, within the window."""
        return float(np.interp(seconds, self._clock, (*self.times, self.end)))

    def to_clock(self, seconds: float) -> float:
        """The time of the window's clock at seconds of the file."""
        return float(np.interp(seconds, (*self.times, self.end), self._clock))

    @property
    def _clock(self) -> tuple[float, ...]:
        """Labels, and the time of the clock at which the last frame makes way."""
        steps = np.diff(self.labels)
        pace = 1.0 if not len(steps) else float((steps / np.diff(self.times)).mean())
        return *self.labels, self.labels[-1] + max(self.end - self.times[-1], 0.0) * pace


def choose_step(times: Sequence[float]) -> float | None:
    """How far apart the labels of frames shown at `times` are, where these lie too close together; None where labels
    are seconds."""
    return _STRETCHED if len(times) > 1 and min(np.diff(times)) < LEAST_SPACING else None


def label_frames(times: Sequence[float], step: float | None) -> tuple[float, ...]:
    """The window's own clock at frames shown at `times`: seconds since the first, or `step` for each frame."""
    if step is not None:
        return tuple(step * i for i in range(len(times)))
    return tuple((np.array(times) - times[0]).round(6).tolist())


def count_overlap(spacing: float, frames: int, seconds: float = OVERLAP_SECONDS) -> int:
    """Frames that a window shares with the next."""
    return min(max(OVERLAP_FRAMES, round(seconds / spacing)), frames // 2)


def choose_frames(
    timestamps: Sequence[float], duration: float, spacing: float, *, start: float | None = None,
    end: float | None = None, changes: tuple[Times, Times] | None = None,
) -> list[int]:  # fmt: skip
    """Indices of the frames on display every `spacing` seconds between two times. `changes` are times and scores:
    within half a step a frame makes way for the first one after the greatest change, if that is well above the usual.
    `KeyeError` for a part in which nothing is shown, and for more frames than an index has."""
    number, _, _ = find_time_range(timestamps, duration, video_start=start, video_end=end)
    first = max(timestamps[number], start or 0.0)
    last = max(first, timestamps[-1] if end is None else min(end, timestamps[-1]))
    count = int((last - first) / spacing + SAME_TIME) + 1
    if count > MOST_FRAMES:
        raise KeyeError(f"a frame every {spacing:g} s of {last - first:,.0f} s makes {count:,} frames, more than "
                        f"{MOST_FRAMES:,}; choose a wider spacing")  # fmt: skip
    targets = first + spacing * np.arange(count)
    if changes is not None and len(changes[0]):
        targets = _move_to_changes(targets, spacing, *changes)
    return find_displayed_frames(timestamps, targets.tolist(), tolerance=SAME_TIME)


def _move_to_changes(targets: Times, spacing: float, times: Times, scores: Times) -> Times:
    """Targets moved by less than half a step to the greatest change around them."""
    usual = float(np.median(scores)) + 2 * float(scores.std())
    moved = targets.copy()
    for i, target in enumerate(targets.tolist()):
        a, b = bisect_left(times, target - spacing / 2), bisect_left(times, target + spacing / 2)
        if a < b and scores[best := a + int(scores[a:b].argmax())] > usual:
            moved[i] = times[best]
    return moved


def plan_windows(
    timestamps: Sequence[float],
    duration: float,
    chosen: Sequence[int],
    *,
    spacing: float,
    frames: int,
    overlap: int | None = None,
    first_number: int = 0,
) -> list[SearchWindow]:
    """Windows of at most `frames` of the `chosen` frames of a video whose frames are shown at `timestamps`, each
    sharing `overlap` with the next; the last one may be shorter."""
    overlap = count_overlap(spacing, frames) if overlap is None else overlap
    assert 0 <= overlap < frames and chosen
    times = [timestamps[i] for i in chosen]
    step, windows = frames - overlap, list[SearchWindow]()
    for begin in range(0, max(len(times) - overlap, 1), step):
        part = tuple(times[begin : begin + frames])
        after = begin + frames
        end = times[after] if after < len(times) else duration
        labels = label_frames(part, choose_step(part))
        windows.append(SearchWindow(first_number + len(windows), part, labels, end, spacing))
    return windows
