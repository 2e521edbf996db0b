"""Still images: opened under limits, turned upright, converted to RGB and resized as the official code does."""

from __future__ import annotations

import struct
import warnings
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from keye.config import ProcessorConfig
from keye.errors import MediaError
from keye.media.fetch import MAX_IMAGE_BYTES, Source, fetch_source
from keye.media.options import DEFAULTS, MediaOptions
from keye.media.sizes import check_sides, encoded_size, image_size
from keye.media.unmet import warn_of_image

#: Formats that are read; of an animation or a multi-page file the first picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Most pixels an image may have before it is decoded (300 MB as RGB).
MAX_IMAGE_PIXELS = 100_000_000
#: What Pillow raises for a file whose content is wrong.
_DAMAGE = (OSError, ValueError, TypeError, SyntaxError, EOFError, MemoryError, struct.error)


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
    options: MediaOptions = DEFAULTS,
    *,
    pixel_limit: int = MAX_IMAGE_PIXELS,
) -> ImagePlan:
    """Reads only the header. Raises `MediaError` for a file that is no image we read, or an image too large."""
    with _stream(source) as file:
        image = _open(file, source.name, pixel_limit)
        width, height = image.size
        if not options.strict_official and _orientation(image, source.name) in (5, 6, 7, 8):
            # The EXIF orientations that swap the axes.
            width, height = height, width
    check_sides(height, width, source.name, ratio=options.resized is None)
    held = image_size(height, width, config, options)
    new_height, new_width = encoded_size(*held, config, options)
    warn_of_image(source.name, (new_height, new_width), config, options)
    tokens = (new_height // config.factor) * (new_width // config.factor)
    return ImagePlan(source.name, width, height, new_width, new_height, tokens)


def read_image(source: Source, *, pixel_limit: int = MAX_IMAGE_PIXELS, strict_official: bool = False) -> Image.Image:
    """Decodes an image and turns it upright (EXIF; the official code leaves it as stored). Modes with an alpha channel
    become RGBA, all others RGB.

    Raises `MediaError` for a file that is no image we read, has more than `pixel_limit` pixels, or is damaged.
    """
    with _stream(source) as file:
        image = _open(file, source.name, pixel_limit)
        try:
            upright = image if strict_official else ImageOps.exif_transpose(image)
            return upright.convert("RGBA" if upright.mode == "RGBA" else "RGB")
        except _DAMAGE as error:
            raise _damaged(source.name, error) from None


def as_rgb(image: Image.Image, config: ProcessorConfig) -> Image.Image:
    """RGB of a picture as the utilities make it: Preview puts RGBA on white, the others drop the alpha channel."""
    if image.mode == "RGBA" and config.generation == "preview":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def hold_image(image: Image.Image, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size that the official utilities return (PIL bicubic on the RGB image)."""
    return resize_exactly(as_rgb(image, config), *image_size(image.height, image.width, config, options))


def resize_image(image: Image.Image, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size the model sees: `hold_image`, then the processor's own resize."""
    pixels = hold_image(image, config, options)
    height, width, _ = pixels.shape
    return resize_exactly(Image.fromarray(pixels), *encoded_size(height, width, config, options))


def resize_exactly(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Bicubic resize of an RGB image to uint8 [height, width, 3]; untouched when the size is right already."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _stream(source: Source) -> BinaryIO:
    return fetch_source(source, max_bytes=MAX_IMAGE_BYTES).open()


def _orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 if there is none. In a PNG it may stand behind the pixels, so a file that is cut short
    fails here."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except _DAMAGE as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> MediaError:
    return MediaError(f"{name} is damaged ({error}); download or export it again")


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
