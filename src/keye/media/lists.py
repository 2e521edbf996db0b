"""A video that is given as a list of pictures: which of them are used, at which size, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError, MediaError
from keye.media import sampling, sizes
from keye.media.decode.image_reader import MAX_LIST_PIXELS, ImageReader
from keye.media.image import SIDEWAYS, plan_image, resize_exactly
from keye.media.pixels.patches import Pixels, as_frames
from keye.media.source.fetch import MAX_IMAGE_BYTES, Source, fetch_source

#: What sentences call a video that is given as pictures.
LISTED = "the list of frames"


def select_range(count: int, options: MediaOptions) -> tuple[int, int, int]:
    """First index, last index and number of the pictures of a list that lie in the part asked for; all of `count` where
    no times are known. Officially a list has no parts."""
    times = options.timestamps
    if times is not None and len(times) != count:
        raise KeyeError(f"{count} frames have {len(times)} timestamps; give one for each frame")
    if times is None and options.fps is not None:
        times = tuple(i / options.fps for i in range(count))
    if not times or options.strict_official:
        return 0, count - 1, count
    # The last picture is on display as long as the others are on average.
    step = (times[-1] - times[0]) / max(count - 1, 1)
    return sampling.time_range(
        times, times[-1] + step, video_start=options.video_start, video_end=options.video_end
    )  # fmt: skip


def select_listed(count: int, config: ProcessorConfig, options: MediaOptions) -> tuple[list[int], float]:
    """Preview: which of `count` listed pictures are used, the last repeated to an even number, and their average rate.

    Officially all are; `nframes` and `max_frames` are honoured unless `strict_official`.
    """
    fps = options.fps or config.fps
    first, last, count = select_range(count, options)
    if options.timestamps is not None:
        fps = sampling.average_rate(options.timestamps[first : last + 1]) or fps
    wanted = min(options.nframes or count, options.max_frames or count, count)
    indices = list(range(first, last + 1))
    if wanted < count and not options.strict_official:
        indices = sampling.sample_indices(first, last, wanted)
        fps *= wanted / count
    return indices + indices[-1:] * (-len(indices) % config.frame_factor), fps


def sample_list(
    pictures: Any, config: ProcessorConfig, options: MediaOptions
) -> tuple[Sequence[Pixels], tuple[float, ...] | None]:
    """1.5 and 2.0: the sampled pictures of a list (or an array of frames), as RGB of one size, and their times.

    They are sampled like the frames of a video at `fps`, else the configuration's rate; times are known only with
    `fps` or `timestamps`.
    """
    frames = as_frames(pictures)
    native = options.fps or config.fps
    first, _, count = select_range(len(frames), options)
    indices = sampling.sample_frames(count, native, config, options, first=first)
    if not indices:
        raise sampling.explain_no_frame(LISTED, config, options)
    pixels = resize_to_one_size([frames[i] for i in indices], config, options, listed=True)
    if options.timestamps is not None:
        return pixels, tuple(options.timestamps[i] for i in indices)
    return pixels, None if options.fps is None else tuple(i / native for i in indices)


def resize_to_one_size(
    pictures: Pixels | Sequence[Any], config: ProcessorConfig, options: MediaOptions, *, listed: bool
) -> Sequence[Pixels]:
    """The frames as RGB arrays of one size, that of the first: its own, or if `listed` that of a picture of a list."""
    first = pictures[0]
    height, width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
    size = sizes.listed_frame_size(height, width, config, options) if listed else (height, width)
    if isinstance(pictures, np.ndarray) and size == (height, width):
        return list(pictures)
    return [resize_exactly(open_frame(frame).convert("RGB"), *size) for frame in pictures]


def open_frame(frame: NDArray[np.uint8] | Image.Image) -> Image.Image:
    return Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame


def count_least_list_tokens(pictures: Sequence[Source], config: ProcessorConfig, options: MediaOptions) -> int:
    """Visual tokens that a list of picture files takes at least: exactly that, except for 1.5, whose frames are
    not classified yet. `MediaError` where the pictures have too many pixels together, `KeyeError` for bad options."""
    (height, width), count = _first_size(pictures), len(pictures)
    if config.release.sizes_lists_as_images:
        indices, _ = select_listed(count, config, options)
        first_size = sizes.image_size(height, width, config, options)
        return len(indices) * config.count_tokens(sizes.encoded_size(*first_size, config, options))
    _, _, count = select_range(count, options)
    if options.timestamps is None:
        height, width = sizes.listed_frame_size(height, width, config, options)
        count = sampling.smart_nframes(count, options.fps or config.fps, config, options)
    if count < 1:
        return 0
    frame_sizes = sizes.frame_sizes(height, width, count, config, options)
    return count * config.count_tokens(frame_sizes.fast)


def _first_size(pictures: Sequence[Source]) -> sizes.Size:
    """Height and width of the first picture, upright."""
    if not all(picture.untrusted for picture in pictures):
        plan = plan_image(pictures[0], ProcessorConfig())
        return plan.source_height, plan.source_width
    with ImageReader([fetch_source(picture, max_bytes=MAX_IMAGE_BYTES) for picture in pictures]) as reader:
        headers = [reader.header(index) for index in range(len(pictures))]
    if sum(header.width * header.height for header in headers) > MAX_LIST_PIXELS:
        raise MediaError(
            f"the pictures of {pictures[0].name} have too many pixels together; shrink them or send a video file"
        )
    first = headers[0]
    return (first.width, first.height) if first.orientation in SIDEWAYS else (first.height, first.width)
