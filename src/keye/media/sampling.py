"""Which frames of a video are taken, and how many. Integer arithmetic only: no pixels, no torch.

The rules are those of each generation's own code, reproduced to the last integer, oddities included; `MediaOptions`
says where a request departs from them. Their sources: `smart_nframes` of keye-vl-utils 1.0.0 (Preview) and 1.5.2 (1.5),
and of `keye_adaptive_video.py` in Kwai-Keye/sglang (2.0).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from keye.config import ProcessorConfig
from keye.errors import KeyeError, MediaError, Option
from keye.media.options import DEFAULTS, MediaOptions


def smart_nframes(
    total_frames: int, native_fps: float, config: ProcessorConfig, options: MediaOptions = DEFAULTS
) -> int:
    """How many of `total_frames` frames are sampled, at `fps` (default: the configuration's, never above native).

    1.5 and 2.0: n = min(max(int(total / native * fps), min_frames), max_frames, cap, total), where the cap is what the
    budget holds when every frame has the fewest tokens. Preview: an even number between even limits.
    `nframes` asks for a number outright; the cap and the length of the video still limit it. Officially 1.5 and 2.0
    ignore `nframes`, 1.5 ignores `min_frames` and finds no frame in a clip shorter than 1 / fps, and Preview fails
    where its limits leave less than two frames; `strict_official` reproduces all that.
    """
    if config.generation == "preview":
        return _even_nframes(total_frames, native_fps, config, options)
    cap = min(frame_cap(config, options), total_frames)
    limit = options.max_frames or config.max_frames
    if limit is not None:
        cap = min(cap, limit)
    if options.nframes is not None and not options.strict_official:
        return min(options.nframes, cap)
    wanted = int(total_frames / native_fps * min(options.fps or config.fps, native_fps))
    if not (options.strict_official and config.generation == "1.5"):
        wanted = max(wanted, options.min_frames or config.min_frames)
    return min(wanted, cap)


def _even_nframes(total: int, native_fps: float, config: ProcessorConfig, options: MediaOptions) -> int:
    """Preview: `nframes` rounded to a multiple of `frame_factor`, or the rate's number within limits so rounded."""
    factor = config.frame_factor
    if options.nframes is not None:
        if options.fps is not None:
            raise KeyeError("{} and {} exclude each other; give one of them", Option("fps"), Option("nframes"))
        count = round(options.nframes / factor) * factor
    else:
        low = math.ceil((options.min_frames or config.min_frames) / factor) * factor
        most = options.max_frames or min(config.max_frames or total, total)
        high = most // factor * factor
        wanted = total / native_fps * (options.fps or config.fps)
        count = math.floor(min(max(wanted, low), high, total) / factor) * factor
    if factor <= count <= total:
        return count
    if options.strict_official:
        raise KeyeError(f"{count} frames cannot be taken from a video of {total}; at least {factor} are needed")
    return total if total < factor else min(max(count, factor), total // factor * factor)


def frame_cap(config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> int:
    """The most frames the budget can hold when every frame has the fewest tokens (1.5 and 2.0).

    2.0 uses the configuration's smallest frame, whatever limits the request sets; 1.5 the request's.
    """
    token = config.token_pixels
    total = options.video_total_pixels
    smallest: float = config.video_min_tokens * token
    if config.generation == "1.5" and options.min_pixels is not None:
        smallest = options.min_pixels
    return math.floor((config.video_total_tokens * token if total is None else total) / smallest)


def no_frame(name: str, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> MediaError:
    """Why no frame of a video is sampled: the budget, or (1.5 under `strict_official`) a clip that is too short."""
    if frame_cap(config, options) < 1:
        return MediaError("the token budget for {} holds no frame; raise {}", name, Option("video_total_pixels"))
    return MediaError(
        "{} is shorter than a sampling step of {:.3g} s, and the official code takes no frame of it; raise {} or "
        "leave {} out",
        name, 1 / (options.fps or config.fps), Option("fps"), Option("strict_official"),
    )  # fmt: skip


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
    begin = Option("video_start", f"{0.0 if start is None else start:g}")
    stop = Option("video_end", f"{duration if end is None else end:g}")
    raise KeyeError(
        "{} and {} leave fewer than two frames of a video of {} s; choose a longer range inside it",
        begin, stop, f"{duration:.2f}",
    )  # fmt: skip


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
    options: MediaOptions = DEFAULTS,
    *,
    first: int = 0,
) -> list[int]:
    """Indices of the sampled frames among `total_frames` frames that begin at index `first`."""
    count = smart_nframes(total_frames, native_fps, config, options)
    return sample_indices(first, first + total_frames - 1, count)


def displayed_frames(timestamps: Sequence[float], targets: Sequence[float], *, tolerance: float) -> list[int]:
    """For each target time the index of the frame on display then: the last one at or before target + tolerance.

    All in seconds, ascending. A frame on display at several targets is named once, so the result may be shorter.
    """
    chosen = (max(bisect_right(timestamps, target + tolerance) - 1, 0) for target in targets)
    return sorted(set(chosen))
