"""keye-vl-utils 1.5.2, the utilities of Keye-VL-1.5: same names, arguments, defaults and results.

    from keye.compat.utils_1_5 import process_vision_info

`nframes`, `min_frames`, `video_start`, `video_end` and the sides of a size, which the original ignores or refuses for
videos, are honoured, and a clip shorter than one sampling step has a frame; `"strict_official": True` beside a medium
brings the original's behaviour back.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
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
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError, KeyeWarning
from keye.media import sizes
from keye.media.image import open_frames, open_image, resize_first, sample_list
from keye.media.pixels.patches import Pixels
from keye.media.pixels.slowfast import frame_types
from keye.media.source.fetch import as_source
from keye.media.video import VideoReader
from keye.releases import V1_5

__all__ = ["extract_vision_info", "fetch_image", "fetch_video", "process_vision_info", "smart_resize"]

CONFIG = ProcessorConfig.of(V1_5)
IMAGE_FACTOR = FACTOR
MIN_PIXELS = CONFIG.image_min_tokens * CONFIG.token_pixels
MAX_PIXELS = CONFIG.image_max_tokens * CONFIG.token_pixels


def smart_resize(
    height: int, width: int, factor: int = IMAGE_FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size (height, width) of a picture in whole tokens; see `keye.media.sizes.smart_resize`."""
    return sizes.smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)


def fetch_image(ele: Item, size_factor: int = IMAGE_FACTOR, is_video: bool = False) -> Image.Image:
    """The image of an item as an RGB PIL image at its size; `is_video` applies the limits of a video's frame."""
    check_factor(size_factor)
    options = options_of(ele, "image", total_key="video_total_pixels")
    image = open_image(picture_of(ele), strict_official=options.strict_official)
    if is_video:
        height, width = sizes.compute_listed_frame_size(image.height, image.width, CONFIG, options)
        return image.convert("RGB").resize((width, height))
    return Image.fromarray(resize_first(image, CONFIG, options))


def fetch_video(ele: Item, image_factor: int = IMAGE_FACTOR) -> tuple[Tensor, dict[str, Any]]:
    """The sampled frames of an item, uint8 [F, 3, H, W] at the file's own size (of a list: at the size that a list's
    pictures are held), and what the processor needs to know of them: `height`, `width`, `fast_height`, `fast_width`,
    `frame_types` int32 [F] (0 slow, 1 fast) and, where times are known, `timestamps` float32 [F] in seconds."""
    check_factor(image_factor)
    options = options_of(ele, "video", total_key="video_total_pixels")
    pictures = open_frames(medium_of(ele, "video"))
    if pictures is not None:
        frames, times = sample_list(pictures, CONFIG, options)
        array = np.stack(list(frames))
    else:
        array, times = _decode_video(medium_of(ele, "video"), options)
    types = frame_types(array, CONFIG, options.min_frame_similarity)
    fast, (_, height, width, _) = sum(types), array.shape
    result = sizes.compute_frame_sizes(height, width, len(types) - fast, CONFIG, options, fast=fast)
    kwargs: dict[str, Any] = dict(
        zip(("height", "width", "fast_height", "fast_width"), (*result.slow, *result.fast), strict=True)
    )
    if times is not None:
        kwargs["timestamps"] = torch.tensor(times, dtype=torch.float32)
    kwargs["frame_types"] = torch.tensor(types, dtype=torch.int32)
    return torch.from_numpy(array).permute(0, 3, 1, 2), kwargs


def process_vision_info(
    conversations: Sequence[Any] | None = None, vision_infos: Sequence[Item] | None = None,
    image_factor: int = IMAGE_FACTOR, *, return_video_kwargs: bool | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """(images, videos, kwargs) of a conversation or a list of them, or of items; images and videos are None where there
    are none. `kwargs` has a list for each of the keys of `fetch_video`, for the processor: an entry for each video,
    None where a video lacks what another has.

    `return_video_kwargs` is an argument of Preview's utilities that the model card of 1.5 passes and 1.5.2 itself does
    not take: True changes nothing, and False leaves `kwargs` out.
    """
    if return_video_kwargs is not None:
        text = "keye-vl-utils 1.5.2 itself refuses return_video_kwargs: it always returns (images, videos, kwargs)"
        warnings.warn(KeyeWarning(text), stacklevel=2)
    if vision_infos is None:
        if conversations is None:
            raise KeyeError("neither conversations nor vision_infos is given; pass one of them")
        vision_infos = extract_vision_info(conversations)
    images: list[Image.Image] = []
    videos: list[tuple[Tensor, dict[str, Any]]] = []
    for item in vision_infos:
        if kind_of(item) == "image":
            images.append(fetch_image(item, image_factor))
        else:
            videos.append(fetch_video(item, image_factor))
    kwargs: dict[str, list[Any]] = defaultdict(list)
    for name in dict.fromkeys(name for _, facts in videos for name in facts):
        kwargs[name] = [facts.get(name) for _, facts in videos]
    result = (images or None, [frames for frames, _ in videos] or None)
    return result if return_video_kwargs is False else (*result, kwargs)


def _decode_video(value: object, options: MediaOptions) -> tuple[Pixels, tuple[float, ...]]:
    with VideoReader(as_source(value), track=options.track) as reader:
        plan = reader.plan(CONFIG, options)
        first, times = plan.start_offset, plan.timestamps
        if first:  # the original counts seconds from the first frame of the file
            times = tuple(round(time - first, 6) for time in times)
        return np.stack(list(reader.frames(plan, native=True))), plan.label_times or times
