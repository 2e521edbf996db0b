"""At which size pictures and frames are encoded, and how a budget of tokens is shared among frames: integers only.

The rules are those of each release's own code, reproduced to the last integer, oddities included; `keye.releases` has
those that differ. Sizes are (height, width) in pixels; one visual token stands for `factor` x `factor` pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import KeyeError, MediaError, Option
from keye.releases import FrameBudget

#: Longest side over shortest side that an image or frame may have.
MAX_ASPECT_RATIO = 200
#: Most pixels of one encoded picture, more than any context holds: larger ones are refused before they are made.
MAX_ENCODED_PIXELS = 2**28

Size = tuple[int, int]


def smart_resize(height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float) -> Size:
    """The size near the given one whose sides are multiples of `factor` and whose area fits: rule of the utilities.

    Rounds each side to the nearest multiple (Python's rounding: halves to even); above `max_pixels` shrinks with
    floor, below `min_pixels` grows with ceil. A side is never below `factor`, so a thin image may exceed
    `max_pixels`, and growing may too, as in the official rule. Raises `KeyeError` above an aspect ratio of 200.
    """
    check_sides(height, width)
    h, w = _fit_limits(height, width, *round_to_tokens(height, width, factor), factor, min_pixels, max_pixels)
    return _check_encoded(max(h, factor), max(w, factor))


def round_to_tokens(height: int, width: int, factor: int) -> Size:
    """The size with each side rounded to whole tokens, at least one."""
    return max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)


def resize_for_processor(
    height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float, strict_official: bool = False
) -> Size:
    """The size that the image processor of Preview and 1.5 gives a picture, after the utilities have sized it.

    Unlike `smart_resize` it first raises a short side to `factor`, keeping the aspect. Officially nothing keeps a side
    from becoming 0 when a thin picture is shrunk, which fails; here the side stays at `factor` unless
    `strict_official`. Source: `image_processing_keye.py`.
    """
    check_sides(height, width, ratio=False)
    if height < factor:
        height, width = factor, round(width * factor / height)
    if width < factor:
        height, width = round(height * factor / width), factor
    check_sides(height, width)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    h, w = _fit_limits(height, width, h, w, factor, min_pixels, max_pixels)
    if strict_official and min(h, w) < 1:
        raise KeyeError(f"a picture of {width}x{height} pixels has no size of at most {max_pixels:g} pixels; crop it")
    return _check_encoded(max(h, factor), max(w, factor))


def _check_encoded(height: int, width: int) -> Size:
    """The size itself; `KeyeError` where no model could read a picture of it."""
    if height * width > MAX_ENCODED_PIXELS:
        raise KeyeError(
            "the picture would be encoded at {:.3g} pixels, more than {:,}; lower {}",
            float(height * width), MAX_ENCODED_PIXELS, Option("min_pixels"),
        )  # fmt: skip
    return height, width


def _fit_limits(height: int, width: int, h: int, w: int, factor: int, min_pixels: float, max_pixels: float) -> Size:
    if h * w > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        return math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    if h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def check_sides(height: int, width: int, name: str = "the picture", *, ratio: bool = True) -> None:
    """`MediaError` with `name` for a picture that has no sides, or is too long for its width."""
    if min(height, width) < 1:
        raise MediaError(f"{name} is {width}x{height} pixels; both sides must be at least 1")
    if ratio and max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"{name} is {width}x{height} pixels, an aspect ratio above {MAX_ASPECT_RATIO}; crop it before use"
        )


def compute_image_size(height: int, width: int, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> Size:
    """The size at which the utilities hold an image; limits default to those of the configuration.

    With `resized_height` and `resized_width` that size is rounded under the configuration's limits and `min_pixels`
    and `max_pixels` are ignored, as officially.
    """
    low: float = config.image_min_tokens * config.token_pixels
    high: float = config.image_max_tokens * config.token_pixels
    if options.resized is not None:
        height, width = options.resized
        check_sides(height, width, "the size asked for")
    else:
        low, high = _pick_limits(options, low, high)
    return smart_resize(height, width, factor=config.factor, min_pixels=low, max_pixels=high)


def compute_encoded_size(height: int, width: int, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> Size:
    """The size that reaches the model of a picture which the utilities hold at height x width.

    Where the configuration has limits of the processor (Preview, 1.5) a second resize brings the picture into them.
    Officially they overrule what a request allows or demands; here a request's `max_pixels`, `min_pixels` or size
    widens them, unless `strict_official`.
    """
    low, high = config.processor_min_pixels, config.processor_max_pixels
    if low is None and high is None:
        return height, width
    least, most = float(low or 0), math.inf if high is None else float(high)
    if not options.strict_official:
        if options.resized is not None:
            return height, width
        least = min(least, math.inf if options.min_pixels is None else options.min_pixels)
        most = max(most, options.max_pixels or 0, options.min_pixels or 0)
    return resize_for_processor(
        height, width, factor=config.factor, min_pixels=least, max_pixels=most, strict_official=options.strict_official
    )


def compute_listed_frame_size(
    height: int, width: int, config: ProcessorConfig, options: MediaOptions = DEFAULTS
) -> Size:
    """The size at which a picture of a list that stands for a video is first held, before the video's own size.

    It is treated as an image where the release says so, else the limits of a frame apply.
    """
    if config.release.sizes_lists_as_images or options.resized is not None:
        return compute_image_size(height, width, config, options)
    token = config.token_pixels
    low, high = _pick_limits(options, config.video_min_tokens * token, config.video_max_tokens * token)
    return smart_resize(height, width, factor=config.factor, min_pixels=low, max_pixels=high)


def _pick_limits(options: MediaOptions, low: float, high: float) -> tuple[float, float]:
    return (
        low if options.min_pixels is None else options.min_pixels,
        high if options.max_pixels is None else options.max_pixels,
    )


class FrameSizes(NamedTuple):
    """Sizes of a video's slow frames and of its fast ones; equal where there are no fast frames."""

    slow: Size
    fast: Size


def compute_total_pixels(config: ProcessorConfig, duration: float, options: MediaOptions = DEFAULTS) -> float:
    """Pixel budget of one video that lasts `duration` seconds.

    The budget is the request's, else the configuration's. The release may divide it by the number of videos, and with
    `adaptive_budget` give a single short video a share of it. Source: `get_video_total_pixels_by_duration`.
    """
    total: float = config.video_total_tokens * config.token_pixels
    if options.video_total_pixels is not None:
        total = options.video_total_pixels
    if config.release.splits_budget:
        total /= options.video_count
    adaptive = config.adaptive_budget if options.adaptive_budget is None else options.adaptive_budget
    if adaptive and options.video_count == 1:
        total *= next((share for limit, share in config.release.adaptive_shares if duration <= limit), 1.0)
    return float(total)


def compute_frame_sizes(
    height: int, width: int, slow: int, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, fast: int = 0
) -> FrameSizes:
    """The sizes at which `slow` slow and `fast` fast frames of height x width pixels are encoded.

    `min_pixels` and `max_pixels` limit one frame, `video_total_pixels` all of them, by the rule of the release
    (`Release.frame_limits`). A fast frame gets `fast_ratio` of the tokens that a slow frame has after rounding.
    Sources: `fetch_video` of keye-vl-utils 1.0.0 and 1.5.2, `keye_adaptive_video.py`.
    """
    release, token = config.release, config.token_pixels
    least = config.video_min_tokens * token
    if options.resized is not None and (release.official_frame_size or not options.strict_official):
        size = height, width = compute_image_size(height, width, config, options)
        # The size asked for may be below the smallest frame; a fast frame is never larger than a slow one.
        low: float = min(least, height * width)
        least = int(low)
    else:
        total = options.video_total_pixels
        budget = FrameBudget(
            slow=slow, fast=fast, total=config.video_total_tokens * token if total is None else total, smallest=least,
            largest=config.video_max_tokens * token, min_pixels=options.min_pixels, max_pixels=options.max_pixels,
            token=token, fast_ratio=config.fast_ratio, frame_factor=config.frame_factor, strict=options.strict_official,
        )  # fmt: skip
        low, high = release.frame_limits(budget)
        size = smart_resize(height, width, factor=config.factor, min_pixels=low, max_pixels=high)
    if not release.classifies_frames:
        return FrameSizes(size, size)
    most = max(int(size[0] * size[1] / token * config.fast_ratio) * token, least)
    return FrameSizes(size, smart_resize(height, width, factor=config.factor, min_pixels=low, max_pixels=most))
