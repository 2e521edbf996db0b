"""Pillow at work on one image file: opened under limits, turned upright, converted. Knows no sources, names or arrays.

Runs in the main process for files of one's own and in a confined process for those of strangers. numpy is not imported.
"""

from __future__ import annotations

import struct
import warnings
from typing import BinaryIO

from PIL import Image, ImageOps

from keye.media.wire import WorkerError

#: Formats that are read; of an animation or a multi-page file the first picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Most pixels an image may have before it is decoded (300 MB as RGB).
MAX_IMAGE_PIXELS = 100_000_000
#: What Pillow raises for a file whose content is wrong.
_DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    MemoryError,
    LookupError,
    ArithmeticError,
    struct.error,
)


class DamagedPicture(WorkerError):
    """The file's content is wrong. The cause is what Pillow said; it may hold addresses, so strangers are not told."""

    def __init__(self) -> None:
        super().__init__("is damaged; download or export it again")


def open_picture(file: BinaryIO, pixel_limit: int) -> Image.Image:
    """The image in a file, not decoded yet. Raises `WorkerError` for a format that is not read or too many pixels."""
    try:
        with warnings.catch_warnings():
            # Our own limit replaces Pillow's warning; its hard limit still raises.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise WorkerError(f"has more than {pixel_limit:,} pixels; shrink it first") from None
    except _DAMAGE:
        raise WorkerError(f"is no image that can be read; use one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > pixel_limit:
        raise WorkerError(f"has {width}x{height} pixels, more than the limit of {pixel_limit:,}; shrink it first")
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. In a PNG it may stand behind the pixels, so a file that is cut short
    fails here."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except _DAMAGE as error:
        raise DamagedPicture from error


def upright(image: Image.Image, *, strict_official: bool = False) -> Image.Image:
    """The decoded image, turned by its EXIF unless `strict_official`; RGBA with an alpha channel, else RGB."""
    try:
        turned = image if strict_official else ImageOps.exif_transpose(image)
        return turned.convert("RGBA" if turned.mode == "RGBA" else "RGB")
    except _DAMAGE as error:
        raise DamagedPicture from error
