"""What will be sampled from a video and what it costs, decided before anything is decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import KeyeError, KeyeWarning, MediaError, Option, warn
from keye.media import sampling, sizes
from keye.media.info import VideoInfo
from keye.media.notes import VISIBLE, Note, emit, format_places, warn_video_options

#: Seconds by which the end of a part may lie after that of the video without a warning.
_BEYOND = 0.5


@dataclass(frozen=True)
class FastFrames:
    """Which frames of a plan are fast (1.5): `types` has 0 (slow) or 1 (fast) for each; their size and visual
    tokens."""

    types: tuple[int, ...]
    width: int
    height: int
    tokens_per_frame: int


@dataclass(frozen=True)
class VideoPlan:
    """What will be sampled from a video and what it costs, known before anything is decoded.

    Times are seconds on the clock that players show, which counts from the container's start: the first frame of the
    file comes at `start_offset`, later than 0 where sound begins first, and the last one ends at `duration`.
    `timestamps` are those of the sampled frames; `label_times` those in their labels where they differ, as the official
    code counts them (`strict_official`). `part` is from when to when the video was looked at: its first frame may be on
    display since before. `width` and `height` are those of the frames the model sees; each becomes `tokens_per_frame`
    visual tokens. `sample_fps` is the average rate of the sampled frames.
    `fast` is there once the frames of a video for 1.5 have been classified, which needs their pixels: until then
    every frame counts as slow and the tokens are an estimate. `constant_rate` says whether the file's frames are evenly
    spaced. `notes` are sentences about how the file was read (`VideoInfo.notes`). `mirrored` and `track` are those of
    the file. With `deinterlace` interlaced frames are deinterlaced; `tone_map` is "pq" or "hlg" where frames of that
    range are made ones of standard range.
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
    mirrored: bool = False
    track: int = 1
    deinterlace: bool = True
    tone_map: str | None = None
    notes: tuple[str, ...] = field(default=(), repr=False)
    start_offset: float = 0.0
    label_times: tuple[float, ...] | None = field(default=None, repr=False)
    part: tuple[float, float] | None = None
    strict_media: bool = field(default=False, repr=False)

    @classmethod
    def of(
        cls,
        info: VideoInfo,
        indices: Sequence[int],
        size: sizes.Size,
        *,
        tokens_per_frame: int,
        rate: float,
        options: MediaOptions = DEFAULTS,
    ) -> Self:
        """The plan of frames `indices` of a probed video at `size` (height, width); `rate` is their `sample_fps`. Of
        `options` those count that say what pixels look like."""
        return cls(
            name=info.name, duration=info.duration, native_fps=info.fps, source_width=info.width,
            source_height=info.height, rotation=info.rotation, frame_indices=tuple(indices),
            timestamps=tuple(info.timestamps[i] for i in indices), pts=tuple(info.pts[i] for i in indices),
            width=size[1], height=size[0], tokens_per_frame=tokens_per_frame, sample_fps=rate,
            constant_rate=info.constant_rate, notes=tuple(map(str, info.notes)), start_offset=info.start_offset,
            mirrored=info.mirrored, track=info.track, deinterlace=options.deinterlaces,
            tone_map=info.transfer if options.tone_map and info.transfer != "sdr" else None,
            strict_media=options.strict_media,
        )  # fmt: skip

    @property
    def frames(self) -> int:
        return len(self.frame_indices)

    @property
    def labels(self) -> tuple[float, ...]:
        """The seconds in the frames' labels."""
        return self.timestamps if self.label_times is None else self.label_times

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
        displayed = {k: v for k, v in asdict(self).items() if k not in ("pts", "constant_rate", "strict_media")}
        data: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in displayed.items()}
        if self.fast is not None:
            data["fast"]["types"] = list(self.fast.types)
        return {**data, "frames": self.frames, "visual_tokens": self.visual_tokens}


def make_plan(info: VideoInfo, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> VideoPlan:
    """The plan for a probed video: the official rules for the number of frames, their places and their size.

    At a constant frame rate the official indices are taken as they are. At a variable rate as many times are spread
    evenly over the chosen range, and the frame on display at each is taken once; under `strict_official` indices are
    taken there too.
    """
    info = _apply_options(info, options)
    start, end = options.video_start, options.video_end
    if options.strict_official and not config.release.official_parts and (start is not None or end is not None):
        named = map(Option, ("video_start", "video_end", "strict_official"))
        raise KeyeError(f"the official {config.release.name} code takes neither {{}} nor {{}}; leave {{}} out", *named)
    _check_complete(info, options)
    sizes.check_sides(info.height, info.width, info.name, ratio=options.resized is None)
    if options.strict_official:  # frames are counted from the first at the average rate, whatever their times
        fps = info.declared_fps or info.fps
        first, last, count = sampling.find_frame_range(info.frame_count, fps, video_start=start, video_end=end)
        part = _Part(first, last, fps, count / fps, first / fps, last / fps)
    else:
        part = _find_part(info, start, end)
    if end is not None and end > info.duration + _BEYOND and not options.strict_official:
        sentence = "{} lies after the end of {} at {:.1f} s; the part ends there"
        warn(KeyeWarning(sentence, Option("video_end", f"{end:g}"), info.name, info.duration), stacklevel=2)
    request_options = options
    options = options.replace(video_total_pixels=sizes.compute_total_pixels(config, part.seconds, options))
    indices, sampled = _sample_part(info, part, config, options)
    if not indices:
        raise sampling.explain_no_frame(info.name, config, options)
    height, width = sizes.compute_frame_sizes(info.height, info.width, len(indices), config, options).slow
    if config.release.frame_resize == "twice":
        height, width = sizes.compute_encoded_size(height, width, config, options)
    warn_video_options(
        info.name, len(indices), (height, width), config, request_options, seconds=part.seconds, sampled=sampled
    )
    emit(info.name, info.notes)
    rate, tokens = len(indices) / (part.last - part.first + 1) * part.fps, config.count_tokens((height, width))
    plan = VideoPlan.of(info, indices, (height, width), tokens_per_frame=tokens, rate=rate, options=options)
    if not options.strict_official:
        displayed = part.begin, info.duration if end is None else max(part.end, min(end, info.duration))
        plan = dataclasses.replace(plan, part=displayed)
    return _add_labels(plan, info, config, options)


def _apply_options(info: VideoInfo, options: MediaOptions) -> VideoInfo:
    """The facts under `options`, with notes on what these make of the pictures."""
    notes = list(info.notes)
    if info.stored_size is not None:
        width, height = info.stored_size
        if options.strict_official:
            info = dataclasses.replace(info, width=width, height=height, stored_size=None)
        else:
            notes.append(Note(f"its pixels are not square: {width}x{height} is shown as {info.width}x{info.height}"))
    if info.transfer != "sdr" and not options.tone_map and not options.strict_official:
        notes.append(Note(
            "it has high dynamic range ({}), and its frames look pale: {} makes them ones of standard range",
            (info.transfer.upper(), Option("tone_map")),
        ))  # fmt: skip
    elif info.transfer == "sdr" and options.tone_map:
        notes.append(Note("it has standard range already, so that {} has no effect", (Option("tone_map"),)))
    return dataclasses.replace(info, notes=tuple(notes))


def _check_complete(info: VideoInfo, options: MediaOptions) -> None:
    """`MediaError` where the file lacks bytes of the part; under `strict_media` for any file that ends early or is
    damaged."""
    end, strict = options.video_end, options.strict_media
    if info.cut_short and (strict or end is None or end > info.duration):
        option = Option("strict_media") if strict else Option("video_end", int(info.duration * 10) / 10)
        raise MediaError(
            "{} is cut short: {:.1f} of {:.1f} s can be read; download it again or " + ("leave {} out" if strict else
            "pass {}"), info.name, info.duration, info.declared_duration, option,
        )  # fmt: skip
    if strict and info.ends_early:
        raise MediaError(
            "{} lacks bytes at its end; download it again or leave {} out", info.name, Option("strict_media")
        )  # fmt: skip
    if strict and info.damage:
        raise MediaError(
            "{} is damaged at {}; download it again or leave {} out",
            info.name, format_places(info.damage), Option("strict_media"),
        )  # fmt: skip


def add_frame_types(
    plan: VideoPlan, types: Sequence[int], config: ProcessorConfig, options: MediaOptions = DEFAULTS
) -> VideoPlan:
    """The plan of a video whose frames have been classified (1.5): 0 slow, 1 fast. Sizes follow from how many are."""
    fast = sum(types)
    frame_sizes = sizes.compute_frame_sizes(
        plan.source_height, plan.source_width, len(types) - fast, config, options, fast=fast
    )  # fmt: skip
    return dataclasses.replace(
        plan, width=frame_sizes.slow[1], height=frame_sizes.slow[0],
        tokens_per_frame=config.count_tokens(frame_sizes.slow),
        fast=FastFrames(tuple(types), frame_sizes.fast[1], frame_sizes.fast[0], config.count_tokens(frame_sizes.fast)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """The frames `first` to `last` of a video, on display for `seconds`, and the times between which they are sampled.
    `fps` is their rate."""

    first: int
    last: int
    fps: float
    seconds: float
    begin: float
    end: float


def _find_part(info: VideoInfo, start: float | None, end: float | None) -> _Part:
    """What is on display between two times. At a variable rate its own rate counts, not that of the whole file."""
    times = info.timestamps
    first, last, count = sampling.find_time_range(times, info.duration, video_start=start, video_end=end)
    begin = max(times[first], start or 0.0)
    stop = max(begin, times[-1] if end is None else min(times[-1], end))
    fps, seconds = info.fps, count / info.fps
    if not info.constant_rate and count < info.frame_count:
        displayed = (info.duration if end is None else min(info.duration, end)) - begin
        if displayed > sampling.SAME_TIME:
            fps, seconds = count / displayed, displayed
    return _Part(first, last, fps, seconds, begin, stop)


def _sample_part(info: VideoInfo, part: _Part, config: ProcessorConfig, options: MediaOptions) -> tuple[list[int], int]:
    """The frames taken from a part, and the number of times at which frames were looked up."""
    count = part.last - part.first + 1
    if info.constant_rate or options.strict_official:
        indices = sampling.sample_frames(count, part.fps, config, options, first=part.first)
        return indices, len(indices)
    targets = sampling.sample_times(count, part.seconds, part.begin, part.end, config, options)
    return sampling.find_displayed_frames(info.timestamps, targets, tolerance=sampling.SAME_TIME), len(targets)


def _add_labels(plan: VideoPlan, info: VideoInfo, config: ProcessorConfig, options: MediaOptions) -> VideoPlan:
    """The plan with the times in the labels where they are not those of players, and a note of it."""
    if config.release.whole_video:
        off = plan.timestamps[0]
        text = (
            "the model sees no absolute times: in the text of its answers they count from the first sampled frame, at "
            f"{off:.1f} s; intervals are converted to those that players show"
        )
    elif options.strict_official:
        fps = info.declared_fps or info.fps
        plan = dataclasses.replace(plan, label_times=tuple(i / fps for i in plan.frame_indices))
        off = max(abs(label - time) for label, time in zip(plan.labels, plan.timestamps, strict=True))
        text = (
            f"frames are labelled as the official code counts, by index from the first frame: up to {off:.1f} s from "
            "what players show; times in the text of an answer count so too, its intervals are turned into those of "
            "players"
        )
    else:
        return plan
    if off < VISIBLE:
        return plan
    emit(plan.name, (Note(text),))
    return dataclasses.replace(plan, notes=(*plan.notes, text))
