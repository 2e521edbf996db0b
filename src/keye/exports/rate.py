"""Frame rates and timecode: seconds to whole frames, frames to the labels that editors read, and back.

Rates are exact fractions (23.976 is 24000/1001). Drop-frame timecode leaves out labels, never frames: at 29.97 two and
at 59.94 four at the start of each minute but every tenth, so that the labels keep to the clock (SMPTE ST 12-1).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from keye.errors import KeyeError

#: Rates that editing programs know.
STANDARD = tuple(
    sorted([Fraction(n) for n in (24, 25, 30, 48, 50, 60, 100, 120)]
           + [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)])
)  # fmt: skip
#: Rates that have drop-frame timecode.
DROPPING = (Fraction(30_000, 1001), Fraction(60_000, 1001))
#: Measured rates this close to a standard one, as a share, are that: 23.976 and 24 are a thousandth apart.
_SAME = 4e-4
_RATE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?|\d{1,9}/\d{1,9})\s*(df|ndf)?", re.IGNORECASE)
_TIMECODE = re.compile(r"(\d{1,2}):([0-5]?\d):([0-5]?\d)([:;.,])(\d{1,3})")
_DAY = 24 * 3600


@dataclass(frozen=True)
class FrameRate:
    """Frames a second as a fraction, and whether timecode is counted drop-frame."""

    value: Fraction
    drop_frame: bool = False

    def __post_init__(self) -> None:
        assert self.value > 0 and (not self.drop_frame or self.value in DROPPING)

    @property
    def base(self) -> int:
        """The whole number of frames in a second of timecode."""
        return max(1, round(self.value))

    @property
    def is_ntsc(self) -> bool:
        """Whether it is a thousandth slower than `base`."""
        return self.value == Fraction(self.base * 1000, 1001)

    @property
    def half_frame_ms(self) -> float:
        """How far the nearest frame may lie from a time, in milliseconds."""
        return float(500 / self.value)

    def seconds(self, frames: int) -> Fraction:
        """How long so many frames last."""
        return frames / self.value

    def nearest(self, seconds: float) -> int:
        """The frame that begins closest to a time; a time in the middle of two goes to the later one."""
        return math.floor(Fraction(seconds) * self.value + Fraction(1, 2))

    def timecode(self, frame: int) -> str:
        """The label of a frame: hh:mm:ss:ff, drop-frame hh:mm:ss;ff. It starts over after 24 hours."""
        if self.drop_frame:
            dropped, minute = self.base // 15, 60 * self.base - self.base // 15
            tens, rest = divmod(frame, 10 * 60 * self.base - 9 * dropped)
            frame += 9 * dropped * tens + dropped * max(0, (rest - dropped) // minute)
        seconds, frames = divmod(frame, self.base)
        minutes, seconds = divmod(seconds % _DAY, 60)
        mark = ";" if self.drop_frame else ":"
        width = len(str(self.base - 1))
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}{mark}{frames:0{max(2, width)}d}"

    def frame_of(self, timecode: str, base: int | None = None) -> int:
        """The frame that a label stands for; of a label that drop-frame leaves out, the next one. `base`: the label
        counts that many frames a second. `KeyeError` for anything else."""
        hours, minutes, seconds, frames = _split(timecode)
        if frames >= (base or self.base):
            raise KeyeError(f"{timecode!r} has no such frame: at {self} seconds have {base or self.base} frames")
        frames = frames if base is None else frames * self.base // base
        count = ((hours * 60 + minutes) * 60 + seconds) * self.base + frames
        if not self.drop_frame:
            return count
        dropped, total = self.base // 15, hours * 60 + minutes
        if minutes % 10 and not seconds and frames < dropped:
            count += dropped - frames
        return count - dropped * (total - total // 10)

    def __str__(self) -> str:
        return f"{float(self.value):.5g} frames a second" + (" drop-frame" if self.drop_frame else "")


def _split(timecode: str) -> tuple[int, int, int, int]:
    match = _TIMECODE.fullmatch(timecode.strip())
    if match is None or int(match[1]) > 23:
        raise KeyeError(f"{timecode!r} is not a timecode: write hh:mm:ss:ff, or hh:mm:ss;ff for drop-frame")
    return int(match[1]), int(match[2]), int(match[3]), int(match[5])


def is_drop_frame(timecode: str) -> bool:
    """Whether a label is written as drop-frame: a semicolon, or in some files a comma, before the frames."""
    match = _TIMECODE.fullmatch(timecode.strip())
    return match is not None and match[4] in ";,"


def parse_rate(text: str, *, drop_frame: bool | None = None) -> FrameRate:
    """A rate that a user wrote: 25, 23.976, 30000/1001, "29.97 df", "59.94ndf". Where it does not say so, 29.97 and
    59.94 are `drop_frame`, by default yes. `KeyeError` for anything else."""
    match = _RATE.fullmatch(str(text).strip())
    number = None
    if match is not None and not match[1].endswith("/0"):
        number = Fraction(match[1])
    if match is None or number is None or not 1 <= number <= 1000:
        raise KeyeError(f"{text!r} is not a frame rate: write 23.976, 25, 29.97df, 29.97ndf, 59.94df or 30000/1001")
    value = snap(float(number), 1e-3 / 2)
    wanted = {"df": True, "ndf": False, None: None}[match[2] and match[2].lower()]
    if wanted and value not in DROPPING:
        raise KeyeError(f"{text!r} has no drop-frame timecode: only 29.97 and 59.94 have")
    if wanted is None:
        wanted = value in DROPPING and drop_frame is not False
    return FrameRate(value, wanted)


def snap(rate: float, tolerance: float = _SAME) -> Fraction:
    """The standard rate that a measured one is, within a share of it; else the rate as a fraction."""
    closest = min(STANDARD, key=lambda standard: abs(float(standard) - rate))
    if abs(float(closest) - rate) <= tolerance * rate:
        return closest
    return Fraction(rate).limit_denominator(1001)


def editing_rate(rate: Fraction) -> Fraction:
    """The rate of a timeline for pictures of any rate: itself if it is standard, else the lowest standard one that is a
    multiple of it, else the next higher one, at most 120."""
    if rate in STANDARD:
        return rate
    above = [standard for standard in STANDARD if standard >= rate] or [STANDARD[-1]]
    multiples = [s for s in above if abs(float(s / rate) - round(s / rate)) < 0.01 * float(s / rate)]
    return (multiples or above)[0]
