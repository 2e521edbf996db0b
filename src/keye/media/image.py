"""Still images: opened under limits, turned upright, converted to RGB and resized as the official code does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import MediaError
from keye.media.container.animations import tiff_pages
from keye.media.decode.image_reader import Header, ImageReader, is_confined
from keye.media.decode.picture import MAX_IMAGE_PIXELS, open_picture, orientation, picture_count, upright
from keye.media.decode.wire import WorkerError
from keye.media.notes import Note, emit, warn_image_options
from keye.media.pixels.patches import as_picture, in_bytes, is_array
from keye.media.sizes import check_sides, encoded_size, image_size
from keye.media.source.fetch import (
    MAX_IMAGE_BYTES,
    Reference,
    Source,
    as_source,
    check_media,
    decode_list,
    fetch_source,
    media_kind,
)

#: The EXIF orientations that swap the axes.
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImagePlan:
    """What one image will cost. Sizes in pixels; `visual_tokens` counts tokens of the decoder. `notes` are sentences
    about what of the file is used."""

    name: str
    source_width: int
    source_height: int
    width: int
    height: int
    visual_tokens: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def plan_image(
    source: Reference, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, pixel_limit: int = MAX_IMAGE_PIXELS
) -> ImagePlan:
    """Reads only the header. Raises `MediaError` for a file that is not an image that keye reads, or is too large."""
    source = fetch_source(source, max_bytes=MAX_IMAGE_BYTES)
    with _open_image(source, pixel_limit) as image:
        header = _header_of(image, pixel_limit)
    width, height = header.width, header.height
    if not options.strict_official and header.orientation in SIDEWAYS:
        width, height = height, width
    check_sides(height, width, source.name, ratio=options.resized is None)
    first_size = image_size(height, width, config, options)
    new_height, new_width = encoded_size(*first_size, config, options)
    warn_image_options(source.name, (new_height, new_width), config, options)
    file_notes = () if options.strict_official else tuple(_note_contents(source, header))
    emit(source.name, file_notes)
    tokens = config.count_tokens((new_height, new_width))
    return ImagePlan(source.name, width, height, new_width, new_height, tokens, tuple(map(str, file_notes)))


def read_image(
    source: Reference, *, pixel_limit: int = MAX_IMAGE_PIXELS, strict_official: bool = False, planned: bool = False
) -> Image.Image:
    """Decodes an image and turns it upright (EXIF; the official code leaves it as stored). Images with transparency, as
    an alpha channel or a transparent colour, become RGBA, all others RGB; how levels of more than 8 bits become 8 is
    described in docs/video.md. `planned` leaves out the notes that `plan_image` gives.

    Raises `MediaError` for a file that is not an image that keye reads, is damaged, or has more than `pixel_limit`
    pixels.
    """
    source = fetch_source(source, max_bytes=MAX_IMAGE_BYTES)
    with _open_image(source, pixel_limit) as image:
        if not planned and not strict_official:
            emit(source.name, _note_contents(source, _header_of(image, pixel_limit)))
        if isinstance(image, ImageReader):
            return in_bytes(image.picture(0, pixel_limit, strict_official=strict_official))
        return in_bytes(upright(image, strict_official=strict_official))


def open_image(value: object, *, strict_official: bool = False) -> Image.Image:
    """The picture that a user gave as a file or in memory; `strict_official` leaves it as stored, not upright."""
    if isinstance(value, Image.Image) or is_array(value):
        return as_picture(value, strict_official=strict_official)
    return read_image(as_source(value), strict_official=strict_official)


def open_frames(value: Any) -> Any:
    """The frames of a video that is given as pictures: an array or tensor, a list of pictures (files or in memory), or
    a data URL of several JPEG images. None for a video file."""
    if is_array(value):
        return value
    pictures: Sequence[Any] | None = value if isinstance(value, list | tuple) else decode_list(value)
    if pictures is None:
        return None
    untrusted = [picture for picture in pictures if isinstance(picture, Source) and picture.untrusted]
    if untrusted and len(untrusted) == len(pictures):
        # One confined process for all of them; a picture of its own for each would start as many.
        with ImageReader([fetch_source(picture, max_bytes=MAX_IMAGE_BYTES) for picture in untrusted]) as reader:
            return reader.pictures()
    return [open_image(picture) for picture in pictures]


def convert_to_rgb(image: Image.Image, config: ProcessorConfig) -> Image.Image:
    """RGB of a picture as the utilities make it: RGBA on white where the release says so, else without its alpha
    channel."""
    if image.mode == "RGBA" and config.release.puts_alpha_on_white:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def resize_first(image: Image.Image, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size that the official utilities return (PIL bicubic on the RGB image)."""
    return resize_exactly(convert_to_rgb(image, config), *image_size(image.height, image.width, config, options))


def resize_image(image: Image.Image, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size the model sees: `resize_first`, then the processor's own resize."""
    pixels = resize_first(image, config, options)
    height, width, _ = pixels.shape
    return resize_exactly(Image.fromarray(pixels), *encoded_size(height, width, config, options))


def resize_exactly(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Bicubic resize of an RGB image to uint8 [height, width, 3]; untouched when the size is right already."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _header_of(image: ImageReader | Image.Image, pixel_limit: int) -> Header:
    if isinstance(image, ImageReader):
        return image.header(0, pixel_limit)
    return Header(*image.size, orientation(image), picture_count(image), image.mode)


@contextmanager
def _open_image(source: Source, pixel_limit: int) -> Iterator[ImageReader | Image.Image]:
    """An image file, in this process or, where it has to be, in a confined one."""
    check_media(source)
    if is_confined(source):
        with ImageReader([source]) as reader:
            yield reader
        return
    try:
        with source.open() as file, open_picture(file, pixel_limit) as image:
            yield image
    except WorkerError as error:
        if error.__cause__ is not None:
            raise MediaError(f"{source.name} is damaged ({error.__cause__}); download or export it again") from None
        raise MediaError(f"{source.name} {error}") from None


def _note_contents(source: Source, header: Header) -> Iterator[Note]:
    """What a user may not expect: pictures beside the one that is used, and levels without a fixed range."""
    with source.open() as file:
        pages = tiff_pages(file)
    if media_kind(source) == "video":
        yield Note("it moves, and as an image only its first picture is used; give it as a video for all of it")
    elif pages > 1:
        yield Note(f"it has {pages:,} pages, of which only the first is used; save the others as files of their own")
    elif header.pictures > 1:
        yield Note(f"it holds {header.pictures:,} pictures, of which only the main one is used")
    if header.mode in ("I", "F"):
        yield Note("its levels have 32 bits; where they leave the range from 0 to 255 (or 0 to 1), the lowest becomes "
                   "black and the highest white")  # fmt: skip
