"""What will be sampled from a video and what it costs, decided before anything is decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from keye.config import ProcessorConfig
from keye.errors import KeyeError, MediaError, Option
from keye.media import notes, sampling, sizes
from keye.media.options import DEFAULTS, MediaOptions
from keye.media.unmet import warn_of_video

if TYPE_CHECKING:
    from keye.media.video import VideoInfo


@dataclass(frozen=True)
class FastFrames:
    """Which frames of a plan are fast (1.5), and their size and visual tokens.

    `types` has one entry for each frame: 0 slow, 1 fast.
    """

    types: tuple[int, ...]
    width: int
    height: int
    tokens_per_frame: int


@dataclass(frozen=True)
class VideoPlan:
    """What will be sampled from a video and what it costs, known before anything is decoded.

    `timestamps` are seconds from the first frame of the file. `width` and `height` are those of the frames the model
    sees; each becomes `tokens_per_frame` visual tokens. `sample_fps` is the average rate of the sampled frames.
    `fast` is there once the frames of a video for 1.5 have been told apart, which needs their pixels: until then
    every frame counts as slow and the tokens are an estimate. `constant_rate` says whether the file's frames are evenly
    spaced. `notes` are sentences about how the file was read (`VideoInfo.notes`).
    """

    name: str
    duration: float
    native_fps: float
    source_width: int
    source_height: int
    rotation: int
    frame_indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    pts: tuple[int, ...] = field(repr=False)
    width: int
    height: int
    tokens_per_frame: int
    sample_fps: float
    fast: FastFrames | None = None
    constant_rate: bool = field(default=True, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, info: VideoInfo, indices: Sequence[int], size: sizes.Size, *, tokens_per_frame: int, rate: float
    ) -> Self:
        """The plan of frames `indices` of a probed video at `size` (height, width); `rate` is their `sample_fps`."""
        return cls(
            name=info.name,
            duration=info.duration,
            native_fps=info.fps,
            source_width=info.width,
            source_height=info.height,
            rotation=info.rotation,
            frame_indices=tuple(indices),
            timestamps=tuple(info.timestamps[i] for i in indices),
            pts=tuple(info.pts[i] for i in indices),
            width=size[1],
            height=size[0],
            tokens_per_frame=tokens_per_frame,
            sample_fps=rate,
            constant_rate=info.constant_rate,
            notes=tuple(map(str, info.notes)),
        )

    @property
    def frames(self) -> int:
        return len(self.frame_indices)

    @property
    def visual_tokens(self) -> int:
        if self.fast is None:
            return self.frames * self.tokens_per_frame
        count = sum(self.fast.types)
        return (self.frames - count) * self.tokens_per_frame + count * self.fast.tokens_per_frame

    def frame_size(self, index: int) -> sizes.Size:
        """(height, width) at which frame `index` is encoded."""
        if self.fast is not None and self.fast.types[index]:
            return self.fast.height, self.fast.width
        return self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every field but what only decoding and positions need, and the counts."""
        shown = {k: v for k, v in asdict(self).items() if k not in ("pts", "constant_rate")}
        data: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in shown.items()}
        if self.fast is not None:
            data["fast"]["types"] = list(self.fast.types)
        return {**data, "frames": self.frames, "visual_tokens": self.visual_tokens}


def make_plan(info: VideoInfo, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> VideoPlan:
    """The plan for a probed video: the official rules for the number of frames, their places and their size.

    At a constant frame rate the official indices are taken as they are. At a variable rate they are turned into times
    spread evenly over the chosen range, and the frame on display at each is taken once.
    """
    start, end = options.video_start, options.video_end
    if options.strict_official and config.generation == "1.5" and (start is not None or end is not None):
        named = map(Option, ("video_start", "video_end", "strict_official"))
        raise KeyeError("the official 1.5 code takes neither {} nor {}; leave {} out", *named)
    if info.cut_short and (end is None or end > info.duration):
        raise MediaError(
            "{} is cut short: {:.1f} of {:.1f} s can be read; download it again or pass {}",
            info.name, info.duration, info.declared_duration, Option("video_end", int(info.duration * 10) / 10),
        )  # fmt: skip
    sizes.check_sides(info.height, info.width, info.name, ratio=options.resized is None)
    first, last, count = _frame_range(info, start, end)
    asked, options = options, options.replace(video_total_pixels=sizes.total_pixels(config, count / info.fps, options))
    indices = sampling.sample_frames(count, info.fps, config, options, first=first)
    sampled = len(indices)
    if not info.constant_rate and last > first:
        indices = _by_time(info, indices, first, last)
    if not indices:
        raise sampling.no_frame(info.name, config, options)
    height, width = sizes.frame_sizes(info.height, info.width, len(indices), config, options).slow
    if config.generation == "preview":
        height, width = sizes.encoded_size(height, width, config, options)
    warn_of_video(
        info.name, len(indices), (height, width), config, asked, seconds=count / info.fps, sampled=sampled
    )  # fmt: skip
    notes.emit(info.name, info.notes)
    rate = len(indices) / count * info.fps
    return VideoPlan.of(info, indices, (height, width), tokens_per_frame=_tokens(height, width, config), rate=rate)


def with_frame_types(
    plan: VideoPlan, types: Sequence[int], config: ProcessorConfig, options: MediaOptions = DEFAULTS
) -> VideoPlan:
    """The plan of a video whose frames have been told apart (1.5): 0 slow, 1 fast. Sizes follow from how many are."""
    fast = sum(types)
    found = sizes.frame_sizes(
        plan.source_height, plan.source_width, len(types) - fast, config, options, fast=fast
    )  # fmt: skip
    height, width = found.slow
    return dataclasses.replace(
        plan,
        height=height,
        width=width,
        tokens_per_frame=_tokens(height, width, config),
        fast=FastFrames(tuple(types), found.fast[1], found.fast[0], _tokens(*found.fast, config)),
    )


def _tokens(height: int, width: int, config: ProcessorConfig) -> int:
    return (height // config.factor) * (width // config.factor)


def _frame_range(info: VideoInfo, start: float | None, end: float | None) -> tuple[int, int, int]:
    if info.constant_rate:
        return sampling.frame_range(info.frame_count, info.fps, video_start=start, video_end=end)
    return sampling.time_range(info.timestamps, video_start=start, video_end=end)


def _by_time(info: VideoInfo, indices: list[int], first: int, last: int) -> list[int]:
    """The frames on display at the times that the indices would have if frames were evenly spaced."""
    begin, end = info.timestamps[first], info.timestamps[last]
    scale = (end - begin) / (last - first)
    targets = [begin + (i - first) * scale for i in indices]
    return sampling.displayed_frames(info.timestamps, targets, tolerance=1e-3)
