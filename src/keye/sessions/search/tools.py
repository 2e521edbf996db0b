"""Three ways to look at a long video, for agents: all of it, a stretch, a moment. In seconds, never in frame numbers.

Each answers a question about what it looked at and returns plain data. Knows no plan of its own: what to look at
next is up to who calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from keye.engine.engine import Engine
from keye.errors import KeyeError, is_number
from keye.media.source.fetch import Reference, fetch_source
from keye.sessions.search.looks import Asker, Look, LookReader

#: Frames of a look, and the most seconds that `focus` takes: then frames lie a quarter of a second apart.
FRAMES: Final = 64
FOCUS_SECONDS: Final = 16.0
_PAIR: Final = re.compile(r"\[([0-9]{1,6}(?:\.[0-9]{1,3})?), ([0-9]{1,6}(?:\.[0-9]{1,3})?)\]")


class VideoTools:
    """Looks at one video. Use as a context manager, or close it: a process that decodes stays open.

    Results have `start` and `end` (seconds of the first frame looked at, and at which the last one makes way),
    `spacing`, `times` of the frames, the reply as `text`, and the `intervals` in it, all in seconds of the file.
    """

    def __init__(
        self, engine: Engine, video: Reference, *, media_options: Mapping[str, Any] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._reader = LookReader(fetch_source(video), engine, media_options)
        self._asker = Asker(engine, "anything", check)

    def __enter__(self) -> VideoTools:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process that decodes."""
        self._reader.close()

    @property
    def tokens(self) -> int:
        """Tokens computed so far."""
        return self._asker.tokens

    def overview(self, question: str) -> dict[str, Any]:
        """Asks about frames from all of the video."""
        return self._look(0.0, self._reader.info.duration, question)

    def skim(self, start: float, end: float, question: str) -> dict[str, Any]:
        """Asks about frames from `start` to `end` seconds. `KeyeError` where no frame is shown between them."""
        return self._look(start, end, question)

    def focus(self, start: float, end: float, question: str) -> dict[str, Any]:
        """Asks about at most `FOCUS_SECONDS`, frame by frame or at four a second. Errors as in `skim`."""
        if is_number(start) and is_number(end) and end - start > FOCUS_SECONDS:
            raise KeyeError(f"focus takes at most {FOCUS_SECONDS:g} s, not {end - start:g}; skim takes more")
        return self._look(start, end, question)

    def _look(self, start: float, end: float, question: str) -> dict[str, Any]:
        if not (is_number(start) and is_number(end) and 0 <= start < end):
            raise KeyeError(f"start {start!r} and end {end!r} are not a stretch of a video; give seconds, start first")
        if start >= self._reader.info.duration:
            raise KeyeError(f"start is {start:g} s, but the video ends at {self._reader.info.duration:.1f} s")
        (look,) = self._reader.read([self._reader.choose(start, end, FRAMES)])
        text, intervals = _in_file_seconds(self._asker.ask_text(look, question), look)
        return {
            "start": round(look.start, 3), "end": round(look.end, 3),
            "spacing": round((look.end - look.start) / len(look.indices), 3),
            "times": [round(time, 3) for time in look.times], "text": text, "intervals": intervals,
        }  # fmt: skip


def _in_file_seconds(text: str, look: Look) -> tuple[str, list[list[float]]]:
    """A reply with its intervals in seconds of the file, and those; what names no frame of the look is left out."""
    intervals: list[list[float]] = []

    def convert(match: re.Match[str]) -> str:
        frames = look.frames_of((float(match[1]), float(match[2])))
        if frames is None:
            return ""
        intervals.append([round(seconds, 3) for seconds in look.seconds_of(frames)])
        return f"[{intervals[-1][0]:.1f}, {intervals[-1][1]:.1f}]"

    return _PAIR.sub(convert, text), intervals
