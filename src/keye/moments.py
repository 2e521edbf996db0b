"""What a search in video finds: ranges of time, how sure they are, and what was looked at to find them.

Plain data that the search, exports, the library, the server and the command line share; knows no model and no files.
All times are seconds on the clock of the file, as players show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

#: Whether a second question about the range alone agreed: "twice" if it did, "failed" if not, "no" before it was asked.
Checked = Literal["twice", "no", "failed"]
#: Borders of a moment that lie on a hard cut.
OnCut = Literal["start", "end", "both"]
#: What a search does: read the video, ask about all of it, look closely at the best places, ask a second time.
Stage = Literal["index", "coarse", "close", "verify"]


@dataclass(frozen=True)
class SubtitleLine:
    """A line of a subtitle track and when it is shown."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Moment:
    """A range of a video in which the event happens.

    `probability` (0 to 1) is calibrated, or None where the model gives none. `refined` says that the borders were
    looked at more closely than the coarse spacing. `file` names the video where several were searched. `subtitle` is
    the line that matches the question, if one does. `id` stays the same while the moment is refined and ranked again.
    """

    id: str
    rank: int
    start: float
    end: float
    probability: float | None
    checked: Checked = "no"
    refined: bool = False
    on_cut: OnCut | None = None
    file: str | None = None
    subtitle: SubtitleLine | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SeenSpan:
    """A part of the video of which a frame was looked at at least every `spacing` seconds, `close` where that was to
    check a place found before."""

    start: float
    end: float
    spacing: float
    close: bool = False


@dataclass(frozen=True)
class Coverage:
    """What of a video of `duration` seconds was looked at: spans by spacing, `unseen` spans, places looked at closely,
    frames, and the tokens of the index and of the question (media of close looks included)."""

    duration: float
    seen: Sequence[SeenSpan]
    unseen: Sequence[tuple[float, float]]
    places: int
    frames: int
    index_tokens: int
    query_tokens: int

    @property
    def share(self) -> float:
        """The part of the video that was looked at, 0 to 1."""
        missing = sum(end - start for start, end in self.unseen)
        return 1.0 if self.duration <= 0 else max(0.0, 1 - missing / self.duration)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self), "seen": [asdict(span) for span in self.seen], "share": round(self.share, 6),
            "unseen": [list(span) for span in self.unseen],
        }  # fmt: skip


@dataclass(frozen=True)
class FindNote:
    """A sentence on what was tolerated, left out or not known. `place` is where it belongs: "file", "reply", ..."""

    code: str
    text: str
    place: str = "file"


@dataclass(frozen=True)
class FindResult:
    """The outcome of a search for `query` in `video`.

    `moments` are ranked, those of at least `threshold` probability; `weaker` are the others. `presence` is the
    calibrated probability that the event is anywhere in the video (None where the model gives none). `stopped` says
    that the search was ended before its budget was used. `seconds` is wall time by stage.
    """

    query: str
    video: str
    model: str
    moments: tuple[Moment, ...]
    weaker: tuple[Moment, ...]
    presence: float | None
    threshold: float
    coverage: Coverage
    notes: tuple[FindNote, ...]
    seconds: Mapping[str, float]
    stopped: bool = False

    @property
    def is_found(self) -> bool:
        """Whether there is a moment above the threshold."""
        return bool(self.moments)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the `result` of /v1/video/find and the output of `keye find --json`."""
        return {
            "query": self.query, "video": self.video, "model": self.model, "found": self.is_found,
            "moments": [moment.to_dict() for moment in self.moments],
            "weaker": [moment.to_dict() for moment in self.weaker], "presence": self.presence,
            "threshold": self.threshold, "coverage": self.coverage.to_dict(),
            "notes": [asdict(note) for note in self.notes], "seconds": dict(self.seconds), "stopped": self.stopped,
        }  # fmt: skip


@dataclass(frozen=True)
class FindProgress:
    """How far a stage is: `done` of `total` units ("s" of video, "window", "place"); `seconds_left` where it is
    known."""

    stage: Stage
    done: float
    total: float
    unit: str
    seconds_left: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The event of /v1/video/find."""
        return {"type": "progress", **asdict(self)}


@dataclass(frozen=True)
class MomentsFound:
    """The best moments so far, ranked. Replaces those of the event before."""

    moments: tuple[Moment, ...]

    def to_dict(self) -> dict[str, Any]:
        """The event of /v1/video/find."""
        return {"type": "moments", "moments": [moment.to_dict() for moment in self.moments]}


#: What a search emits; a `FindResult` is the last.
FindEvent: TypeAlias = FindProgress | MomentsFound | FindResult
