"""What is said in a video, as one more score of its seconds: lines of subtitles that match an event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from keye.errors import KeyeError, MediaError
from keye.media.source.fetch import Source
from keye.moments import FindNote, SubtitleLine

if TYPE_CHECKING:
    from keye.sessions.search.coarse import FrameScores

#: A line that matches at least so well is a moment by itself.
STRONG: Final = 0.8


@dataclass(frozen=True)
class Spoken:
    """Lines that match, each with its score from 0 to 1, the best first, and notes on reading them."""

    matches: tuple[tuple[SubtitleLine, float], ...] = ()
    notes: tuple[FindNote, ...] = ()

    @property
    def scores(self) -> FrameScores | None:
        """The lines as scores of the seconds in which they are shown."""
        from keye.sessions.search.coarse import FrameScores
        from keye.sessions.search.subtitles import AROUND

        if not self.matches:
            return None
        starts = np.array([max(line.start - AROUND, 0.0) for line, _ in self.matches])
        ends = np.array([line.end + AROUND for line, _ in self.matches])
        return FrameScores(starts, ends, np.array([score for _, score in self.matches]))

    def line_of(self, start: float, end: float) -> SubtitleLine | None:
        """The best line that is shown near an interval."""
        from keye.sessions.search.subtitles import line_of

        return line_of(self.matches, start, end) if self.matches else None

    def strong_lines(self) -> list[SubtitleLine]:
        """Lines that say the event themselves."""
        return [line for line, score in self.matches if score >= STRONG]


def read_spoken(subtitles: Any, source: Source | None, event: str) -> Spoken:
    """The lines of a video that match an event. `subtitles` is what names them (`keye.media.subtitles`), lines, or
    what was read before; None for those that players show, if there are any."""
    from keye.media.subtitles import Subtitles, load_subtitles
    from keye.sessions.search.subtitles import score_lines

    notes: Sequence[str] = ()
    lines: Sequence[SubtitleLine] = ()
    if isinstance(subtitles, str | Path | None):
        if source is None:
            return Spoken()
        try:
            loaded = load_subtitles(source, subtitles)
        except MediaError as error:
            if subtitles is not None:
                raise
            return Spoken(notes=(FindNote("subtitles", f"the subtitles cannot be read: {error}"),))
        if loaded is not None:
            lines, notes = loaded.lines, loaded.notes
    elif isinstance(subtitles, Subtitles):
        lines, notes = subtitles.lines, subtitles.notes
    elif isinstance(subtitles, list | tuple) and all(isinstance(line, SubtitleLine) for line in subtitles):
        lines = subtitles
    else:
        raise KeyeError(f"subtitles is {subtitles!r:.80}; give a file, a track, 'none' or lines")
    return Spoken(tuple(score_lines(lines, event)), tuple(FindNote("subtitles", str(note)) for note in notes))
