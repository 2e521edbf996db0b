"""How a video becomes windows: what an effort means, and how long it will take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self, get_args

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media import sizes
from keye.media.info import VideoInfo
from keye.sessions.search.windows import count_overlap

#: How much work an index may take: "low" and "high" are the ends of `_EFFORTS`, "auto" is the most that ends in time.
Effort = Literal["auto", "low", "medium", "high"]
#: Seconds between frames and most visual tokens of a frame.
_EFFORTS: Final[Mapping[str, tuple[float, int]]] = {"high": (1.0, 64), "medium": (2.0, 64), "low": (4.0, 16)}
#: What "auto" tries in turn until it is predicted to end within `_AUTO_SECONDS`.
_TRIED: Final = (_EFFORTS["high"], _EFFORTS["medium"], (4.0, 64), _EFFORTS["low"])
_AUTO_SECONDS: Final = 1800.0
#: Where more seconds are predicted, wide windows come first, so many times wider.
_SOON: Final = 120.0
_WIDER: Final = 4
#: Most frames of a window, and those of a model that says what it was made for.
MOST_WINDOW_FRAMES: Final = 256
_SCOPED_FRAMES: Final = 32


@dataclass(frozen=True)
class IndexPlan:
    """`spacings` from the widest to the finest, the frames of a window and those that it shares with the next at the
    finest, the size of a frame, and the options of the video."""

    spacings: tuple[float, ...]
    frames: int
    overlap: int
    height: int
    width: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Self:
        """The plan in the head of an index."""
        names = ("frames", "overlap", "height", "width", "options")
        return cls(tuple(plan["spacings"]), **{name: plan[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the head."""
        return {**asdict(self), "spacings": list(self.spacings), "options": dict(self.options)}

    def overlap_at(self, spacing: float) -> int:
        """Frames that neighbouring windows of a spacing share."""
        return self.overlap if spacing == self.spacings[-1] else count_overlap(spacing, self.frames)


@dataclass(frozen=True)
class Choices:
    """What the user chose; None leaves it to the effort. `wide_first` reads windows of a wider spacing first."""

    effort: Effort = "auto"
    spacing: float | None = None
    window_frames: int | None = None
    wide_first: bool | None = None

    def __post_init__(self) -> None:
        if self.effort not in get_args(Effort):
            raise KeyeError(f"effort is {self.effort!r}; choose one of {', '.join(get_args(Effort))}")
        if self.spacing is not None and not 0.01 <= self.spacing <= 3600:
            raise KeyeError(f"spacing is {self.spacing:g} s; choose 0.01 to 3,600")
        if self.window_frames is not None and not 2 <= self.window_frames <= MOST_WINDOW_FRAMES:
            raise KeyeError(f"window_frames is {self.window_frames}; choose 2 to {MOST_WINDOW_FRAMES}")

    def suit(self, plan: Mapping[str, Any]) -> bool:
        """Whether an index of this plan is what was chosen."""
        return self.spacing in (None, plan["spacings"][-1]) and self.window_frames in (None, plan["frames"])

    def make_plan(
        self, info: VideoInfo, config: ProcessorConfig, options: MediaOptions, plain: Mapping[str, Any],
        predict: Callable[[IndexPlan], float], *, seconds: float, is_scoped: bool,
    ) -> IndexPlan:  # fmt: skip
        """The plan for so many `seconds` of a video; `plain` are its options as plain data, `predict` says how many
        seconds a plan takes. Models that say what they were made for (`is_scoped`) read short windows."""
        frames = self.window_frames or (_SCOPED_FRAMES if is_scoped else MOST_WINDOW_FRAMES)
        for step, tokens in _TRIED if self.effort == "auto" else (_EFFORTS[self.effort],):
            spacing = self.spacing or step
            height, width = _find_size(info, config, options, frames, tokens)
            plan = IndexPlan((spacing,), frames, count_overlap(spacing, frames), height, width, dict(plain))
            if (predicted := predict(plan)) <= _AUTO_SECONDS:
                break
        wide_first = self.wide_first
        if wide_first is None:
            wide_first = predicted > _SOON and seconds > spacing * _WIDER * frames
        return replace(plan, spacings=(spacing * _WIDER, spacing)) if wide_first else plan


class FrameRate:
    """Seconds that a frame takes: measured on a sample first, then as they were."""

    def __init__(self) -> None:
        self._sample, self._seconds, self._frames = 0.0, 0.0, 0

    def measure(self, run: Callable[[], None], frames: int) -> None:
        """Times what computes a sample of so many frames, twice: the first time is not counted."""
        for _ in range(2):
            begin = time.perf_counter()
            run()
            self._sample = (time.perf_counter() - begin) / frames

    def record(self, seconds: float, frames: int) -> None:
        """So many frames took so long, decoding included."""
        self._seconds, self._frames = self._seconds + seconds, self._frames + frames

    def seconds_for(self, frames: float) -> float:
        """Seconds that so many frames will take."""
        return frames * (self._seconds / self._frames if self._frames else self._sample)


def _find_size(info: VideoInfo, config: ProcessorConfig, options: MediaOptions, frames: int, tokens: int) -> sizes.Size:
    """(height, width) of frames with at most so many visual tokens, under what the request allows."""
    most: float = min(max(tokens, config.video_min_tokens), config.video_max_tokens) * config.token_pixels
    most = min(options.max_pixels or most, most)
    least = None if options.min_pixels is None else min(options.min_pixels, most)
    options = options.replace(max_pixels=most, min_pixels=least, fps=None)
    return sizes.compute_frame_sizes(info.height, info.width, frames, config, options).slow
