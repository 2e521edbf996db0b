"""Watches frames that come one after another for an event, and says when it begins and ends.

The last seconds are a window with a clock of its own. Every so often a model is asked whether the event is in it, then
when, and once more about that interval alone: only what passes both questions is reported. Knows frames and a model, no
sources, clocks and networks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np

from keye.errors import KeyeError, Option, is_number
from keye.media.live import LiveFrame
from keye.sessions.search.looks import LABEL_STEP, Look, Spans
from keye.sessions.search.questions import to_probability

#: Frames a second and frames of a window, by default: eight seconds.
RATE, WINDOW_FRAMES = 2.0, 16
#: Seconds of the source between two questions, and without the event before it is reported again.
EVERY, COOLDOWN = 1.0, 30.0
#: Frames at the end of a window about which a question of their own is asked.
_NEWEST: Final = 4
#: Questions in a row without the event that end it.
_MISSES: Final = 2
#: Frames at the end of a window within which an event counts as going on.
_GOING: Final = 2
#: Frames beside an interval that are shown with it when it is checked.
_PADDING: Final = 1


class EventAsker(Protocol):
    """What a watcher asks: `keye.sessions.search.looks.Asker`."""

    def ask_presence(self, looks: Sequence[Look]) -> list[float | None]:
        """Log-odds that the event is in each look."""

    def ask_spans(self, looks: Sequence[Look], certain: Sequence[bool]) -> list[Spans | None]:
        """The first and last frames between which it happens, of looks in which that is `certain` or not."""


@dataclass(frozen=True)
class WatchEvent:
    """An event that began or has ended, in seconds since the source began. `end` is None while it goes on.
    `probability` is the smaller one of what the model gave in its two answers, not calibrated. `clip` is the file that
    shows it, `time` the time of day (ISO 8601) at which it was reported."""

    kind: Literal["start", "end"]
    number: int
    event: str
    source: str
    start: float
    end: float | None
    probability: float
    clip: str | None = None
    time: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the line of `keye watch --json` and the body of a webhook."""
        return asdict(self)


@dataclass(frozen=True)
class WatchOptions:
    """How to watch: frames a second, frames of a window, seconds between questions, the probability from which on the
    event is there, and the seconds after an event in which it is not reported again."""

    rate: float = RATE
    window_frames: int = WINDOW_FRAMES
    every: float = EVERY
    threshold: float = 0.5
    cooldown: float = COOLDOWN

    def __post_init__(self) -> None:
        for name in ("rate", "every"):
            if not is_number(getattr(self, name)) or not 0.01 <= getattr(self, name) <= 3600:
                raise KeyeError("{} must be a number from 0.01 to 3600", Option(name))
        if not is_number(self.threshold) or not 0 < self.threshold < 1:
            raise KeyeError("{} must be a probability between 0 and 1", Option("threshold"))
        if not is_number(self.cooldown) or not 0 <= self.cooldown < float("inf"):
            raise KeyeError("{} must be a number of seconds, 0 or more", Option("cooldown"))
        if not 4 <= self.window_frames <= 256:
            raise KeyeError("{} must be 4 to 256 frames", Option("window_frames"))


@dataclass
class _Active:
    """An event that goes on: what was reported, when it was last seen, and questions in a row without it."""

    report: WatchEvent
    seen: float
    misses: int = 0


class Watcher:
    """Takes frames with `add` and asks with `look`, for one event in one source. `questions` counts those about
    windows, `reported` and `rejected` the events that the second question confirmed and did not."""

    def __init__(self, asker: EventAsker, event: str, source: str, options: WatchOptions | None = None) -> None:
        self.options = options or WatchOptions()
        self._asker, self._event, self._source = asker, event, source
        self._frames: deque[LiveFrame] = deque(maxlen=self.options.window_frames)
        self._active: _Active | None = None
        self._due, self._quiet_until = 0.0, -math.inf
        self.questions = self.rejected = self.reported = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next question."""
        return bool(self._frames) and self._frames[-1].time >= self._due

    def add(self, frame: LiveFrame) -> None:
        """The next frame. A window holds frames of one size, and none from before a gap."""
        if self._frames:
            last = self._frames[-1]
            if frame.time <= last.time:
                return
            if frame.picture.shape != last.picture.shape or frame.time - last.time > 4 / self.options.rate:
                self._frames.clear()
        self._frames.append(frame)

    def look(self) -> list[WatchEvent]:
        """Asks about the window as it is; the events that began or ended by it."""
        look = make_look(list(self._frames))
        self._due = look.times[-1] + self.options.every
        self.questions += 1
        # What has just begun is little of the window, and most of its newest frames.
        newest = part_of(look, len(look.times) - _NEWEST, len(look.times) - 1)
        yes = max((odds for odds in self._asker.ask_presence([look, newest]) if odds is not None), default=None)
        is_there = yes is not None and to_probability(yes) >= self.options.threshold
        if self._active is None:
            return self._begin(look, yes) if is_there and yes is not None else []
        spans = self._spans(look, self._active.report.start) if is_there else []
        return self._go_on(look, spans)

    def finish(self) -> list[WatchEvent]:
        """No more frames will come: an event that goes on ends where it was last seen."""
        return [] if self._active is None else [self._end(self._active.seen)]

    def _begin(self, look: Look, yes: float) -> list[WatchEvent]:
        spans = self._spans(look, self._quiet_until + 1 / self.options.rate)
        if not spans:
            return []
        first, last = spans[-1]
        alone = self._asker.ask_presence([part_of(look, first - _PADDING, last + _PADDING)])[0]
        if alone is None or to_probability(alone) < self.options.threshold:
            self.rejected += 1
            return []
        start, end = look.seconds_of((first, last))
        self.reported += 1
        probability = round(min(to_probability(yes), to_probability(alone)), 4)
        report = WatchEvent("start", self.reported, self._event, self._source, start, None, probability)
        self._active = _Active(report, end)
        is_over = last < len(look.times) - _GOING
        return [report, self._end(end)] if is_over else [report]

    def _go_on(self, look: Look, spans: list[tuple[int, int]]) -> list[WatchEvent]:
        active = self._active
        assert active is not None
        last = spans[-1][1] if spans else -1
        if last >= len(look.times) - _GOING:
            active.seen, active.misses = look.ends[last], 0
            return []
        if spans and look.ends[last] > active.seen - 1 / self.options.rate:
            return [self._end(max(look.ends[last], active.report.start))]
        active.misses += 1
        return [self._end(active.seen)] if active.misses >= _MISSES else []

    def _end(self, end: float) -> WatchEvent:
        assert self._active is not None
        report = self._active.report
        self._active, self._quiet_until = None, end + self.options.cooldown
        values = {**asdict(report), "kind": "end", "end": end}
        return WatchEvent(**values)

    def _spans(self, look: Look, after: float) -> list[tuple[int, int]]:
        """The spans of frames with the event that end after a time, in order."""
        spans = self._asker.ask_spans([look], [True])[0] or ()
        return [span for span in sorted(spans) if look.ends[span[1]] > after]


def make_look(frames: Sequence[LiveFrame]) -> Look:
    """Frames of a window, ascending, labelled half a second apart."""
    times = tuple(frame.time for frame in frames)
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else LABEL_STEP
    labels = tuple(round(LABEL_STEP * i, 1) for i in range(len(frames)))
    pixels = np.stack([frame.picture for frame in frames])
    return Look(tuple(range(len(frames))), times, (*times[1:], times[-1] + step), labels, pixels)


def part_of(look: Look, first: int, last: int) -> Look:
    """Frames `first` to `last` of a look, as far as it has them, as a look of its own."""
    part = slice(max(first, 0), last + 1)
    count = len(look.times[part])
    assert look.pixels is not None
    return Look(look.indices[part], look.times[part], look.ends[part], look.labels[:count], look.pixels[part])
