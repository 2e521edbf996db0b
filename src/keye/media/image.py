"""Still images: opened under limits, turned upright, converted to RGB and resized as the official code does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.errors import MediaError
from keye.media.fetch import MAX_IMAGE_BYTES, Source, fetch_source
from keye.media.image_reader import ImageReader
from keye.media.options import DEFAULTS, MediaOptions
from keye.media.picture import MAX_IMAGE_PIXELS, open_picture, orientation, upright
from keye.media.sizes import check_sides, encoded_size, image_size
from keye.media.unmet import warn_of_image
from keye.media.wire import WorkerError

#: The EXIF orientations that swap the axes.
_SIDEWAYS = (5, 6, 7, 8)


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
    width, height, turn = _header(source, pixel_limit)
    if not options.strict_official and turn in _SIDEWAYS:
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
    source = fetch_source(source, max_bytes=MAX_IMAGE_BYTES)
    if source.untrusted:
        with ImageReader([source]) as reader:
            return reader.picture(0, pixel_limit, strict_official=strict_official)
    try:
        with source.open() as file, open_picture(file, pixel_limit) as image:
            return upright(image, strict_official=strict_official)
    except WorkerError as error:
        _explain(source.name, error)


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


def _header(source: Source, pixel_limit: int) -> tuple[int, int, int]:
    """Width and height as stored, and the EXIF orientation."""
    source = fetch_source(source, max_bytes=MAX_IMAGE_BYTES)
    if source.untrusted:
        with ImageReader([source]) as reader:
            return reader.header(0, pixel_limit)
    try:
        with source.open() as file, open_picture(file, pixel_limit) as image:
            return *image.size, orientation(image)
    except WorkerError as error:
        _explain(source.name, error)


def _explain(name: str, error: WorkerError) -> NoReturn:
    """Raises the sentence with the file's name and, for a file of one's own, with Pillow's words."""
    if error.__cause__ is not None:
        raise MediaError(f"{name} is damaged ({error.__cause__}); download or export it again") from None
    raise MediaError(f"{name} {error}") from None
