"""Still images: opened under limits, turned upright, converted to RGB and resized as the official code does."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from keye.config import ProcessorConfig
from keye.errors import MediaError
from keye.media.fetch import MAX_IMAGE_BYTES, Source, fetch_source
from keye.media.sampling import image_size

#: Formats that are read; of an animation or a multi-page file the first picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Most pixels an image may have before it is decoded (300 MB as RGB).
MAX_IMAGE_PIXELS = 100_000_000


@dataclass(frozen=True)
class ImagePlan:
    """What one image will cost. Sizes in pixels; `visual_tokens` counts tokens of the decoder."""

    name: str
    source_width: int
    source_height: int
    width: int
    height: int
    visual_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_image(
    source: Source,
    config: ProcessorConfig,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    pixel_limit: int = MAX_IMAGE_PIXELS,
) -> ImagePlan:
    """Reads only the header. Raises `MediaError` for a file that is no image we read, or an image too large."""
    with _stream(source) as file:
        image = _open(file, source.name, pixel_limit)
        width, height = image.size
        if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # the EXIF orientations that swap the axes
            width, height = height, width
    new_height, new_width = image_size(height, width, config, min_pixels=min_pixels, max_pixels=max_pixels)
    tokens = (new_height // config.factor) * (new_width // config.factor)
    return ImagePlan(source.name, width, height, new_width, new_height, tokens)


def read_image(source: Source, *, pixel_limit: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image: EXIF orientation applied, mode RGB, alpha dropped.

    Raises `MediaError` for a file that is no image we read, has more than `pixel_limit` pixels, or is damaged.
    """
    with _stream(source) as file:
        image = _open(file, source.name, pixel_limit)
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
            raise MediaError(f"{source.name} is damaged ({error}); download or export it again") from None


def resize_image(
    image: Image.Image,
    config: ProcessorConfig,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    resized_height: int | None = None,
    resized_width: int | None = None,
) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size the model sees (PIL bicubic on the RGB image, as the official code).

    With `resized_height` and `resized_width` that size is rounded under the configuration's limits and `min_pixels`
    and `max_pixels` are ignored, as officially.
    """
    if resized_height and resized_width:
        size = image_size(resized_height, resized_width, config)
    else:
        size = image_size(image.height, image.width, config, min_pixels=min_pixels, max_pixels=max_pixels)
    return resize_exactly(image.convert("RGB"), *size)


def resize_exactly(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Bicubic resize of an RGB image to uint8 [height, width, 3]; untouched when the size is right already."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _stream(source: Source) -> BinaryIO:
    return fetch_source(source, max_bytes=MAX_IMAGE_BYTES).open()


def _open(file: BinaryIO, name: str, pixel_limit: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own limit replaces Pillow's warning; its hard limit still raises.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise MediaError(f"{name} has more than {pixel_limit:,} pixels; shrink it first") from None
    except (OSError, ValueError, SyntaxError, EOFError):
        raise MediaError(f"{name} is no image that can be read; use one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > pixel_limit:
        raise MediaError(f"{name} has {width}x{height} pixels, more than the limit of {pixel_limit:,}; shrink it first")
    return image
