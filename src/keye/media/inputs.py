"""Every form in which a user may give an image or a video, told apart: files that have to be opened, and pictures that
are in memory already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from keye.errors import MediaError
from keye.media.decode.image_reader import ImageReader
from keye.media.image import read_image
from keye.media.pixels.pictures import as_picture, is_array
from keye.media.source.data_urls import decode_list
from keye.media.source.fetch import MAX_IMAGE_BYTES, Source, fetch_source


def as_source(value: object) -> Source:
    """A path, URL, bytes or `Source` as a `Source`; `MediaError` for anything else."""
    if isinstance(value, Source | str | bytes | bytearray) or hasattr(value, "__fspath__"):
        return fetch_source(value)
    raise MediaError(
        f"a medium must be a path, URL, bytes, a PIL image, an array, a tensor or frames, not {type(value).__name__}"
    )


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
    strangers = [picture for picture in pictures if isinstance(picture, Source) and picture.untrusted]
    if strangers and len(strangers) == len(pictures):
        # One confined process for all of them; a picture of its own for each would start as many.
        with ImageReader([fetch_source(picture, max_bytes=MAX_IMAGE_BYTES) for picture in strangers]) as reader:
            return reader.pictures()
    return [open_image(picture) for picture in pictures]
