"""What a list of pictures that stands for a video costs, by arithmetic: from the sizes in their headers, before any of
them is decoded."""

from __future__ import annotations

from collections.abc import Sequence

from keye.config import ProcessorConfig
from keye.errors import MediaError
from keye.media import sampling, sizes
from keye.media.decode.image_reader import MAX_LIST_PIXELS, ImageReader
from keye.media.image import SIDEWAYS, plan_image
from keye.media.options import MediaOptions
from keye.media.processor import listed_indices, listed_range
from keye.media.source.fetch import MAX_IMAGE_BYTES, Source, fetch_source


def least_list_tokens(pictures: Sequence[Source], config: ProcessorConfig, options: MediaOptions) -> int:
    """Visual tokens that a list of picture files takes at least: exactly so many but for 1.5, whose fast frames are not
    told apart yet. `MediaError` where the pictures have too many pixels together, `KeyeError` for bad options."""
    (height, width), count = _first_size(pictures), len(pictures)
    if config.release.sizes_lists_as_images:
        indices, _ = listed_indices(count, config, options)
        held = sizes.image_size(height, width, config, options)
        return len(indices) * _tokens(sizes.encoded_size(*held, config, options), config)
    _, _, count = listed_range(count, options)
    if options.timestamps is None:
        height, width = sizes.listed_frame_size(height, width, config, options)
        count = sampling.smart_nframes(count, options.fps or config.fps, config, options)
    if count < 1:
        return 0
    found = sizes.frame_sizes(height, width, count, config, options)
    return count * _tokens(found.fast, config)


def _tokens(size: sizes.Size, config: ProcessorConfig) -> int:
    return (size[0] // config.factor) * (size[1] // config.factor)


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
