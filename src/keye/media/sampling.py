"""Which frames of a video are taken, and how many. Integer arithmetic only: no pixels, no torch.

The rules are those of each release's own code, reproduced to the last integer, oddities included; `keye.releases` has
those that differ, and `MediaOptions` says where a request departs from them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import KeyeError, MediaError, Option
from keye.releases import FrameDemand

#: Times that differ by less, in seconds, are the same: containers round to milliseconds.
SAME_TIME = 1e-3
#: Most times at which frames are looked up in a video of few frames, whatever rate is asked for.
_MAX_LOOKUPS = 1 << 16


def smart_nframes(
    total_frames: int, native_fps: float, config: ProcessorConfig, options: MediaOptions = DEFAULTS
) -> int:
    """How many of `total_frames` frames are sampled, by the rule of the release (`Release.count_frames`): at `fps`
    (default: the configuration's, never above native), or `nframes` outright, within the request's limits, the budget
    and the length of the video."""
    demand = FrameDemand(
        total=total_frames, native_fps=native_fps, cap=count_affordable_frames(config, options), fps=options.fps,
        nframes=options.nframes, min_frames=options.min_frames, max_frames=options.max_frames, default_fps=config.fps,
        default_min_frames=config.min_frames, default_max_frames=config.max_frames, frame_factor=config.frame_factor,
        strict=options.strict_official,
    )  # fmt: skip
    return config.release.count_frames(demand)


def count_affordable_frames(config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> int:
    """The most frames the budget can hold when every frame has the fewest tokens."""
    token, total = config.token_pixels, options.video_total_pixels
    smallest = config.release.smallest_counted_frame(config.video_min_tokens * token, options.min_pixels)
    return math.floor((config.video_total_tokens * token if total is None else total) / smallest)


def explain_no_frame(name: str, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> MediaError:
    """Why no frame of a video is sampled: the budget, or (1.5 under `strict_official`) a clip that is too short."""
    if count_affordable_frames(config, options) < 1:
        return MediaError("the token budget for {} holds no frame; raise {}", name, Option("video_total_pixels"))
    return MediaError(
        "{} is shorter than a sampling step of {:.3g} s, and the official code takes no frame of it; raise {} or "
        "leave {} out",
        name, 1 / (options.fps or config.fps), Option("fps"), Option("strict_official"),
    )  # fmt: skip


def find_frame_range(
    total_frames: int, native_fps: float, *, video_start: float | None = None, video_end: float | None = None
) -> tuple[int, int, int]:
    """The official rule: first index, last index and count of the frames between two times in seconds from the first
    frame (None: the whole video).

    Times are clamped to the video; the first frame at or after `video_start`, the last at or before `video_end`.
    Raises `KeyeError` when fewer than two frames are left. Source: `calculate_video_frame_range`.
    """
    if native_fps <= 0:
        raise KeyeError(f"the frame rate is {native_fps}; it must be above 0")
    if total_frames <= 0:
        raise KeyeError(f"the video has {total_frames} frames; it must have at least 1")
    if video_start is None and video_end is None:
        return 0, total_frames - 1, total_frames
    duration = total_frames / native_fps
    first, last = 0, total_frames - 1
    if video_start is not None:
        first = math.ceil(min(max(video_start, 0.0), duration) * native_fps)
    if video_end is not None:
        last = min(math.floor(min(max(video_end, 0.0), duration) * native_fps), total_frames - 1)
    if first >= last:
        begin = Option("video_start", f"{0.0 if video_start is None else video_start:g}")
        stop = Option("video_end", f"{duration if video_end is None else video_end:g}")
        raise KeyeError(
            "{} and {} leave fewer than two frames of a video of {} s; choose a longer range inside it",
            begin, stop, f"{duration:.2f}",
        )  # fmt: skip
    return first, last, last - first + 1


def find_time_range(
    timestamps: Sequence[float], duration: float, *, video_start: float | None = None, video_end: float | None = None
) -> tuple[int, int, int]:
    """First index, last index and count of the frames that are on display between two times (None: to the end).

    `timestamps` are the seconds of all frames, ascending; each is on display until the next, the last until `duration`.
    Raises `KeyeError` where nothing is: a range that ends before it starts, or lies before the first frame or after the
    last.
    """
    first, last = 0, len(timestamps) - 1
    texts = (None if seconds is None else f"{seconds:g}" for seconds in (video_start, video_end))
    start, end = map(Option, ("video_start", "video_end"), texts)
    if video_start is not None and video_end is not None and video_end < video_start:
        raise KeyeError("{} lies before {}; swap them or leave one out", end, start)
    if video_start is not None:
        if video_start >= max(duration - SAME_TIME, timestamps[-1] + SAME_TIME):
            sentence = "{} lies after the end of the video at {} s; choose an earlier time"
            raise KeyeError(sentence, start, f"{duration:.2f}")
        first = max(bisect_right(timestamps, video_start + SAME_TIME) - 1, 0)
    if video_end is not None:
        if video_end < timestamps[0] - SAME_TIME:
            sentence = "{} lies before the first frame of the video, which is shown at {} s; choose a later time"
            raise KeyeError(sentence, end, f"{timestamps[0]:.2f}")
        last = bisect_right(timestamps, video_end + SAME_TIME) - 1
    return first, last, last - first + 1


def sample_indices(first: int, last: int, count: int) -> list[int]:
    """`count` indices evenly spread over first..last, both ends included: `torch.linspace(...).round()`.

    torch works in float32, from the left end in the first half and from the right end in the second, with fused
    multiply-add. Rounding decides between neighbouring frames, so the same steps are taken here.
    """
    if count <= 1:
        return [first] * max(count, 0)
    f32, f64, i = np.float32, np.float64, np.arange(count)
    step = f64((f32(last) - f32(first)) / f32(count - 1))
    rising, falling = f64(f32(first)) + step * i, f64(f32(last)) - step * (count - 1 - i)
    return [int(x) for x in np.round(np.where(i < count // 2, rising, falling).astype(f32))]


def sample_frames(
    total_frames: int, native_fps: float, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, first: int = 0
) -> list[int]:
    """Indices of the sampled frames among `total_frames` frames that begin at index `first`."""
    count = smart_nframes(total_frames, native_fps, config, options)
    return sample_indices(first, first + total_frames - 1, count)


def sample_times(
    count: int, seconds: float, begin: float, end: float, config: ProcessorConfig, options: MediaOptions = DEFAULTS
) -> list[float]:
    """Times evenly spread over begin..end, both included, at which `count` frames of a variable rate are sampled, which
    last `seconds`.

    There are as many as `smart_nframes` says; where there are fewer frames a second than are asked for, as many as it
    says of a denser part, since frames that are rare on the whole may lie close together somewhere.
    """
    lookups = count
    if options.nframes is None:
        most = max(64 * count, _MAX_LOOKUPS)
        lookups = max(count, math.ceil(min(seconds * (options.fps or config.fps), most)))
    wanted = smart_nframes(lookups, lookups / seconds, config, options)
    if wanted == 1:
        return [begin]
    return [begin + (end - begin) * i / (wanted - 1) for i in range(wanted)]


def find_displayed_frames(timestamps: Sequence[float], targets: Sequence[float], *, tolerance: float) -> list[int]:
    """For each target time the index of the frame on display then: the last one at or before target + tolerance.

    All in seconds, ascending. A frame on display at several targets is named once, so the result may be shorter.
    """
    return sorted({max(bisect_right(timestamps, target + tolerance) - 1, 0) for target in targets})


def compute_average_rate(timestamps: Sequence[float]) -> float | None:
    """Average frames per second; None when all frames have one time."""
    span = timestamps[-1] - timestamps[0]
    return (len(timestamps) - 1) / span if span > 0 else None
