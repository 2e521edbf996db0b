"""Finds hard cuts among thumbnails that come one after another; knows times and pictures, no files.

A cut is a frame that differs from the one before more than its neighbours do, by more than motion and light explain,
and for good: what returns to the picture before within `FLASH` seconds is a flash. Fades and dissolves are no hard
cuts. Only thumbnails of about a second are retained.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.media.pixels.change import contrast, mean_changes, unexplained_change
from keye.media.pixels.patches import Pixels

#: Share of the picture that must be new at a cut, 0 to 1.
THRESHOLD: Final = 0.45
#: Seconds within which the picture before comes back after a flash; a shorter shot between two alike counts as one.
FLASH: Final = 0.3
#: Of a plain picture, such as a flash, so few seconds long between two others the end is the cut.
_APART: Final = 0.13
#: Mean difference (0..1) below which a frame is not looked at closely, and above which it is beside any motion.
_LEAST_CHANGE, _LARGE = 1.5 / 255, 14 / 255
#: A cut differs so many times more than the frames beside it. Where those are further apart than `_STILL` seconds each
#: is a picture that stands still, and they are not compared.
_PEAK, _STILL = 1.4, 0.5
#: Levels of contrast below which a picture is plain, such as the last one of a fade.
_PLAIN: Final = 5.0
#: A share of new picture below which two frames show the same picture.
_SAME: Final = 0.4
#: Frames before and after that are compared across a possible flash, at most.
_MOST_RETURNS: Final = 10
#: Frames before and after that tell whether a picture is new in fast motion: a flash is not as long.
_CLOSE_BY: Final = 4
#: Frames around one that tell whether all of them are new.
_AROUND: Final = (-3, -2, 2, 3)


class CutDetector:
    """`times` are seconds of all frames that may come, ascending; `cuts` those of the first frames of new shots."""

    def __init__(self, times: Sequence[float], threshold: float = THRESHOLD) -> None:
        self.times, self.threshold = times, threshold
        self.cuts: list[float] = []
        #: Thumbnails of frames `_first`, `_first` + 1, ..., and the mean change of each from the one before.
        self._recent: Pixels | None = None
        self._changes = np.empty(0, dtype=np.float32)
        self._first = self._judged = 0

    @property
    def seen(self) -> int:
        """Frames that have come."""
        return self._first + len(self._changes)

    def push(self, thumbnails: Pixels) -> NDArray[np.float32]:
        """Adds frames, uint8 RGB [frames, 18, 32, 3]; returns the mean change (0..1) of each from the one before."""
        recent = thumbnails[:1] if self._recent is None else self._recent
        changes = mean_changes(np.concatenate([recent[-1:], thumbnails]))
        self._recent = thumbnails if self._recent is None else np.concatenate([recent, thumbnails])
        self._changes = np.concatenate([self._changes, changes])
        while self._has_followers(self._judged):
            self._judge()
        oldest = min(bisect_left(self.times, self.times[self._judged - 1] - 2 * FLASH), self._judged - 6)
        if oldest > self._first:
            self._recent, self._changes = self._recent[oldest - self._first :], self._changes[oldest - self._first :]
            self._first = oldest
        return changes

    def finish(self) -> None:
        """No more frames will come: decides about the last ones."""
        while self._judged < self.seen:
            self._judge()

    def _has_followers(self, number: int) -> bool:
        """Whether enough frames after this one have come to decide about it."""
        return self.seen >= number + 4 and self.times[self.seen - 1] > self.times[number] + FLASH

    def _judge(self) -> None:
        """Decides about the next frame."""
        number = self._judged
        self._judged += 1
        new = self._find_peak(number) if number else None
        if new is None or self._unexplained(number - 1, new) < self.threshold:
            return
        if self._returns(number - 1, new) or self._is_restless(number):
            return
        if self.cuts and self.times[number] - self.cuts[-1] < _APART and contrast(self._picture(number - 1)) < _PLAIN:
            self.cuts.pop()
        self.cuts.append(self.times[number])

    def _find_peak(self, number: int) -> int | None:
        """The first frame that shows what is new if this one changes more than those beside it: itself, or the next
        one where the cut lies inside this one, which shows both shots."""
        change, before, after = self._change(number), self._motion(number - 1), self._motion(number + 1)
        if change < _LEAST_CHANGE:
            return None
        if change >= _PEAK * max(before, after):
            return number
        if min(change, after) >= 2 * _PEAK * max(before, self._motion(number + 2)):
            return number + 1
        # In fast motion or noise: more of the picture is new than before and after. Not at the end of a fade.
        if change < _LARGE or max(contrast(self._picture(n)) for n in (number - 1, number)) < _PLAIN:
            return None
        share = self._unexplained(number - 1, number)
        if share < self.threshold:
            return None
        before = self._newness(number - 1, range(number - 2, number - 2 - _CLOSE_BY, -1))
        after = self._newness(number, range(number + 1, number + 1 + _CLOSE_BY))
        return number if share >= _PEAK * max(before, after) else None

    def _newness(self, number: int, others: Sequence[int]) -> float:
        """The share of a picture that none of the others explains; a flash in one of them does not count."""
        return min((self._unexplained(n, number) for n in others if self._first <= n < self.seen), default=0.0)

    def _is_restless(self, number: int) -> bool:
        """Whether all pictures around are as new as this one, as in noise: then another is not a cut."""
        around = [n for n in self._inside(number, _AROUND) if self._motion(n) > self._change(number) / 3]
        if len(around) < len(_AROUND) - 1:
            return False
        return self._unexplained(number - 1, number) < _PEAK * max(self._unexplained(n - 1, n) for n in around)

    def _returns(self, before: int, number: int) -> bool:
        """Whether the picture of frame `before` comes back soon after `number`, or that of `number` was there soon
        before: a flash begins or ends."""
        after = self._within(range(number + 1, self.seen), self.times[number])
        earlier = self._within(range(before - 1, self._first - 1, -1), self.times[before])
        if any(self._unexplained(before, n) < _SAME for n in after):
            return True
        # Light that has gone out of the picture only in part: what it hid is compared with what comes a little later.
        is_plain = contrast(self._picture(before)) < _PLAIN
        clear = [number, *after[-2:]] if is_plain else [number]
        return any(self._unexplained(n, m) < _SAME for n in earlier for m in clear)

    def _within(self, numbers: range, time: float) -> list[int]:
        """Those of consecutive frames that lie within `FLASH` seconds of a time, at most `_MOST_RETURNS`."""
        near = list[int]()
        for number in numbers:
            if abs(self.times[number] - time) > FLASH:
                break
            near.append(number)
        return near[:: -(-len(near) // _MOST_RETURNS) or 1]

    def _inside(self, number: int, offsets: Sequence[int]) -> list[int]:
        """The frames at these offsets from one that are here with the frame before them."""
        return [number + offset for offset in offsets if self._first < number + offset < self.seen]

    def _change(self, number: int) -> float:
        """The change of a frame from the one before; 0 where it is not here."""
        return float(self._changes[number - self._first]) if self._first <= number < self.seen else 0.0

    def _motion(self, number: int) -> float:
        """The change of a frame as far as it tells of motion: none where pictures stand still."""
        if not self._first < number < self.seen or self.times[number] - self.times[number - 1] > _STILL:
            return 0.0
        return self._change(number)

    def _picture(self, number: int) -> Pixels:
        assert self._recent is not None
        return self._recent[number - self._first]

    def _unexplained(self, before: int, number: int) -> float:
        return unexplained_change(self._picture(before), self._picture(number))
