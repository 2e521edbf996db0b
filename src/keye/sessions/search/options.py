"""How to search: the options of a search, checked, and what each effort goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from keye.errors import KeyeError, is_number, is_whole
from keye.sessions.search.coarse import FrameScorer
from keye.sessions.search.plans import Effort


@dataclass(frozen=True)
class Depth:
    """How far an effort goes: spans that are kept, those looked at whatever they promise and at most, the windows that
    are asked when the event happens, rounds of looks at borders, and the share of the index's tokens that may be
    spent."""

    spans: int
    least: int
    most: int
    windows: int
    rounds: int
    share: float


DEPTHS: Final[Mapping[Effort, Depth]] = {
    "low": Depth(spans=8, least=1, most=4, windows=4, rounds=1, share=1 / 16),
    "medium": Depth(spans=24, least=3, most=16, windows=8, rounds=2, share=1 / 8),
    "auto": Depth(spans=24, least=3, most=16, windows=8, rounds=2, share=1 / 8),
    "high": Depth(spans=64, least=12, most=64, windows=32, rounds=3, share=1 / 2),
}
#: Tokens that may be spent on a short video, whose index has few.
LEAST_BUDGET: Final = 10_000
#: Moments that a search may return: each costs a second question.
MOST_TOP: Final = 100


@dataclass(frozen=True)
class FindOptions:
    """How to search; see `Keye.stream_find`."""

    budget: int | None = None
    top: int = 5
    threshold: float | None = None
    effort: Effort = "auto"
    seconds: float | None = None
    index: Path | None = None
    scenes: bool = True
    subtitles: Any = None
    scorers: Sequence[FrameScorer] = ()
    overwrite: bool = False
    most_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.effort not in get_args(Effort):
            raise KeyeError(f"effort is {self.effort!r}; choose {', '.join(get_args(Effort))}")
        if is_whole(self.top) and self.top > MOST_TOP:
            raise KeyeError(f"top is {self.top}; at most {MOST_TOP} moments of a video are looked at")
        for name, value in (("budget", self.budget), ("top", self.top), ("most_tokens", self.most_tokens)):
            if value is not None and not (is_whole(value) and value > 0):
                raise KeyeError(f"{name} is {value!r}; it must be a whole number above 0")
        if self.threshold is not None and not (is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise KeyeError(f"threshold is {self.threshold!r}; it must be a probability from 0 to 1")
        if self.seconds is not None and not (is_number(self.seconds) and self.seconds > 0):
            raise KeyeError(f"seconds is {self.seconds!r}; it must be a number above 0")
