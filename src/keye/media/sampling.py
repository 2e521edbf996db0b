"""Which frames of a video are taken, how many, and at which size. Integer arithmetic only: no pixels, no torch.

The rules are those of Keye-VL 2.0 as served (Kwai-Keye/sglang, `keye_adaptive_video.py`), reproduced to the last
integer, oddities included. Sizes are in pixels, budgets in pixels unless a name says tokens; one visual token stands
for `factor` x `factor` pixels.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from keye.config import ProcessorConfig
from keye.errors import KeyeError

#: Longest side over shortest side that an image or frame may have.
MAX_ASPECT_RATIO = 200
#: Duration in seconds up to which the share of the token budget applies (option `adaptive_budget`); longer: all of it.
ADAPTIVE_SHARES = ((259.0, 0.09), (518.0, 0.18), (1036.0, 0.36), (2016.0, 0.7))


def smart_resize(height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size (height, width) near the given one whose sides are multiples of `factor` and whose area fits.

    Rounds each side to the nearest multiple (Python's rounding: halves to even); above `max_pixels` shrinks with
    floor, below `min_pixels` grows with ceil. A side is never below `factor`, so a thin image may exceed
    `max_pixels`, and growing may too, as in the official rule. Raises `KeyeError` above an aspect ratio of 200.
    """
    if min(height, width) < 1:
        raise KeyeError(f"the picture is {width}x{height} pixels; both sides must be at least 1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise KeyeError(
            f"the picture is {width}x{height} pixels, an aspect ratio above {MAX_ASPECT_RATIO}; crop it before use"
        )
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        h = math.floor(height / beta / factor) * factor
        w = math.floor(width / beta / factor) * factor
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return max(h, factor), max(w, factor)


def image_size(
    height: int,
    width: int,
    config: ProcessorConfig,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
) -> tuple[int, int]:
    """The size (height, width) at which an image is encoded; limits default to those of the configuration."""
    token = config.factor**2
    return smart_resize(
        height,
        width,
        factor=config.factor,
        min_pixels=config.image_min_tokens * token if min_pixels is None else min_pixels,
        max_pixels=config.image_max_tokens * token if max_pixels is None else max_pixels,
    )


def listed_frame_size(
    height: int,
    width: int,
    config: ProcessorConfig,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
) -> tuple[int, int]:
    """The size at which a picture of a list that stands for a video is first held, before `frame_size` of it."""
    token = config.factor**2
    return smart_resize(
        height,
        width,
        factor=config.factor,
        min_pixels=config.video_min_tokens * token if min_pixels is None else min_pixels,
        max_pixels=config.video_max_tokens * token if max_pixels is None else max_pixels,
    )


def smart_nframes(
    total_frames: int,
    native_fps: float,
    config: ProcessorConfig,
    *,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    video_total_pixels: float | None = None,
) -> int:
    """How many of `total_frames` frames are sampled at `fps` (default: the configuration's, never above native).

    n = min(max(int(total / native * fps), min_frames), max_frames, floor(budget / smallest frame), total). The cap
    uses the configuration's smallest frame, whatever limits the request sets. Source: 2.0 `smart_nframes`.
    """
    fps = min(fps or config.fps, native_fps)
    cap = frame_cap(config, video_total_pixels)
    limit = max_frames or config.max_frames
    if limit is not None:
        cap = min(cap, limit)
    wanted = max(int(total_frames / native_fps * fps), min_frames or config.min_frames)
    return min(wanted, cap, total_frames)


def frame_cap(config: ProcessorConfig, video_total_pixels: float | None = None) -> int:
    """The most frames the budget can hold when every frame has the fewest tokens."""
    token = config.factor**2
    total = config.video_total_tokens * token if video_total_pixels is None else video_total_pixels
    return math.floor(total / (config.video_min_tokens * token))


def frame_range(
    total_frames: int, native_fps: float, *, video_start: float | None = None, video_end: float | None = None
) -> tuple[int, int, int]:
    """First index, last index and count of the frames between two times in seconds (None: the whole video).

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
    _check_range(first, last, video_start, video_end, duration)
    return first, last, last - first + 1


def time_range(
    timestamps: Sequence[float], *, video_start: float | None = None, video_end: float | None = None
) -> tuple[int, int, int]:
    """`frame_range` for frames at irregular times: `timestamps` in seconds, ascending, one for each frame."""
    first, last = 0, len(timestamps) - 1
    if video_start is None and video_end is None:
        return first, last, len(timestamps)
    if video_start is not None:
        first = bisect_left(timestamps, video_start)
    if video_end is not None:
        last = bisect_right(timestamps, video_end) - 1
    _check_range(first, last, video_start, video_end, timestamps[-1])
    return first, last, last - first + 1


def _check_range(first: int, last: int, start: float | None, end: float | None, duration: float) -> None:
    if first < last:
        return
    begin = f"{0.0 if start is None else start:g}"
    stop = f"{duration if end is None else end:g}"
    raise KeyeError(
        f"video_start={begin} and video_end={stop} leave fewer than two frames of a video of {duration:.2f} s; "
        "choose a longer range inside it"
    )


def sample_indices(first: int, last: int, count: int) -> list[int]:
    """`count` indices evenly spread over first..last, both ends included: `torch.linspace(...).round()`.

    torch works in float32, from the left end in the first half and from the right end in the second, with fused
    multiply-add. Rounding decides between neighbouring frames, so the same steps are taken here.
    """
    if count <= 0:
        return []
    if count == 1:
        return [first]
    f32, f64 = np.float32, np.float64
    step = f64((f32(last) - f32(first)) / f32(count - 1))
    i = np.arange(count)
    rising = f64(f32(first)) + step * i
    falling = f64(f32(last)) - step * (count - 1 - i)
    spread = np.where(i < count // 2, rising, falling).astype(f32)
    return [int(x) for x in np.round(spread)]


def sample_frames(
    total_frames: int,
    native_fps: float,
    config: ProcessorConfig,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    video_total_pixels: float | None = None,
    first: int = 0,
) -> list[int]:
    """Indices of the sampled frames among `total_frames` frames that begin at index `first`.

    `nframes` asks for a number of frames outright (2.0 as served ignores it) and excludes `fps`; the budget and the
    length of the video still cap it.
    """
    if nframes is None:
        count = smart_nframes(
            total_frames,
            native_fps,
            config,
            fps=fps,
            min_frames=min_frames,
            max_frames=max_frames,
            video_total_pixels=video_total_pixels,
        )
    else:
        if fps is not None:
            raise KeyeError("fps and nframes exclude each other; give one of them")
        count = min(nframes, total_frames, frame_cap(config, video_total_pixels), max_frames or total_frames)
    return sample_indices(first, first + total_frames - 1, count)


def displayed_frames(timestamps: Sequence[float], targets: Sequence[float], *, tolerance: float) -> list[int]:
    """For each target time the index of the frame on display then: the last one at or before target + tolerance.

    All in seconds, ascending. A frame on display at several targets is named once, so the result may be shorter.
    """
    chosen = (max(bisect_right(timestamps, target + tolerance) - 1, 0) for target in targets)
    return sorted(set(chosen))


def total_pixels(
    config: ProcessorConfig,
    duration: float,
    *,
    video_total_pixels: float | None = None,
    video_count: int = 1,
    adaptive: bool | None = None,
) -> float:
    """Pixel budget of one video that lasts `duration` seconds, of a request with `video_count` videos.

    The budget (`video_total_pixels`, else the configuration's) is divided by the number of videos. The adaptive
    option gives a single short video a share of it. Source: `get_video_total_pixels_by_duration`.
    """
    total = config.video_total_tokens * config.factor**2 if video_total_pixels is None else video_total_pixels
    total /= video_count
    enabled = config.adaptive_budget if adaptive is None else adaptive
    if enabled and video_count == 1:
        total *= next((share for limit, share in ADAPTIVE_SHARES if duration <= limit), 1.0)
    return float(total)


def frame_size(
    height: int,
    width: int,
    frames: int,
    config: ProcessorConfig,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    video_total_pixels: float | None = None,
) -> tuple[int, int]:
    """The size (height, width) at which each of `frames` frames of a video is encoded.

    `min_pixels` and `max_pixels` limit one frame; the smallest frame of the configuration is a floor for both.
    """
    token = config.factor**2
    floor_pixels = config.video_min_tokens * token
    low = max(floor_pixels if min_pixels is None else min_pixels, floor_pixels)
    high = config.video_max_tokens * token if max_pixels is None else max_pixels
    total = config.video_total_tokens * token if video_total_pixels is None else video_total_pixels
    tokens = tokens_per_frame(frames, low / token, high / token, total / token)
    return smart_resize(height, width, factor=config.factor, min_pixels=low, max_pixels=tokens * token)


def tokens_per_frame(frames: int, low: float, high: float, budget: float) -> float:
    """Tokens that each of `frames` frames may have under a budget of tokens, between `low` and `high`.

    The official binary search ends on the first number above the budget, one more than fits; kept for parity.
    """
    left, right = low, high
    while left < right:
        middle = int(left + right) // 2
        if frames * middle > budget:
            right = middle
        else:
            left = middle + 1
    return left
