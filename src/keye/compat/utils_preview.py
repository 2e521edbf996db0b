"""keye-vl-utils 1.0.0, the utilities of Keye-VL-8B-Preview: same names, arguments, defaults and results.

    from keye.compat.utils_preview import process_vision_info

Where the original fails on a video that is too short or ignores an option, this works; `"strict_official": True` beside
a medium brings the original's behaviour back. The environment variable VIDEO_MAX_PIXELS is honoured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from keye.compat.items import (
    FACTOR,
    Item,
    check_factor,
    extract_vision_info,
    kind_of,
    medium_of,
    options_of,
    picture_of,
)
from keye.config import ProcessorConfig, preview_video_max_pixels
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media import sizes
from keye.media.image import open_frames, open_image, resize_first, select_listed
from keye.media.info import VideoInfo
from keye.media.pixels.patches import as_frames, resize_bicubic
from keye.media.sampling import find_frame_range
from keye.media.source.fetch import as_source
from keye.media.video import VideoReader
from keye.releases import PREVIEW

__all__ = ["extract_vision_info", "fetch_image", "fetch_video", "process_vision_info", "smart_resize"]

CONFIG = ProcessorConfig.of(PREVIEW)
IMAGE_FACTOR = FACTOR
MIN_PIXELS = CONFIG.image_min_tokens * CONFIG.token_pixels
MAX_PIXELS = CONFIG.image_max_tokens * CONFIG.token_pixels

Video = Tensor | list[Image.Image]


def smart_resize(
    height: int, width: int, factor: int = IMAGE_FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size (height, width) of a picture in whole tokens; see `keye.media.sizes.smart_resize`."""
    return sizes.smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def fetch_image(ele: Item, size_factor: int = IMAGE_FACTOR) -> Image.Image:
    """The image of an item as an RGB PIL image at its size; transparency is put on white."""
    check_factor(size_factor)
    options = options_of(ele, "image", total_key="total_pixels")
    image = open_image(picture_of(ele), strict_official=options.strict_official)
    return Image.fromarray(resize_first(image, CONFIG, options))


def fetch_video(
    ele: Item, image_factor: int = IMAGE_FACTOR, return_video_sample_fps: bool = False
) -> Video | tuple[Video, float]:
    """The video of an item: float32 [F, 3, H, W] with levels 0..255, or for a list of frames a list of PIL images.

    With `return_video_sample_fps` also the average rate of the frames.
    """
    check_factor(image_factor)
    options = options_of(ele, "video", total_key="total_pixels")
    budget = preview_video_max_pixels()
    if budget is not None and options.video_total_pixels is None:
        options = options.replace(video_total_pixels=budget)
    frames = open_frames(medium_of(ele, "video"))
    video: Video
    if frames is None:
        video, fps = _decode_video(medium_of(ele, "video"), options)
    else:
        pictures = as_frames(frames)
        indices, fps = select_listed(len(pictures), CONFIG, options)
        video = [Image.fromarray(resize_first(open_image(pictures[i]), CONFIG, options)) for i in indices]
    return (video, fps) if return_video_sample_fps else video


def process_vision_info(conversations: Sequence[Any], return_video_kwargs: bool = False) -> tuple[Any, ...]:
    """(images, videos) of a conversation or a list of them, None where there are none; with `return_video_kwargs` also
    {"fps": [...]} for the processor."""
    images: list[Image.Image] = []
    videos: list[Video] = []
    rates: list[float] = []
    for item in extract_vision_info(conversations):
        if kind_of(item) == "image":
            images.append(fetch_image(item))
        else:
            video, fps = fetch_video(item, return_video_sample_fps=True)
            videos.append(video)  # type: ignore[arg-type]
            rates.append(fps)  # type: ignore[arg-type]
    media = (images or None, videos or None)
    return (*media, {"fps": rates}) if return_video_kwargs else media


def _decode_video(value: object, options: MediaOptions) -> tuple[Tensor, float]:
    with VideoReader(as_source(value), track=options.track) as reader:
        plan = reader.plan(CONFIG, _use_official_range(reader.info, options))
        video = torch.empty((plan.frames, 3, plan.height, plan.width))
        for i, frame in enumerate(reader.frames(plan, native=True)):
            video[i] = torch.from_numpy(resize_bicubic(frame, (plan.height, plan.width))).permute(2, 0, 1)
    return video, plan.sample_fps


def _use_official_range(info: VideoInfo, options: MediaOptions) -> MediaOptions:
    """The options with the borders that the original gives a part of a video: frames after its start, not the one that
    is on display then, counted from the first. Where the original finds none, the options as they are."""
    start, end = options.video_start, options.video_end
    if options.strict_official or not info.constant_rate or (start is None and end is None):
        return options
    try:
        first, last, _ = find_frame_range(info.frame_count, info.fps, video_start=start, video_end=end)
    except KeyeError:
        return options
    return options.replace(
        video_start=None if start is None else info.timestamps[first],
        video_end=None if end is None else info.timestamps[last],
    )
