"""Pillow at work on one image file: opened under limits, turned upright, converted. numpy is not imported."""

from __future__ import annotations

import struct
import warnings
from typing import BinaryIO

from PIL import Image, ImageCms, ImageOps

from keye.media.container.completeness import ends_early
from keye.media.container.kinds import HEAD_BYTES, find_heif_format
from keye.media.decode.wire import WorkerError

#: Formats that are read; of an animation or a file of several pages the first picture, of an icon the largest.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO")
#: Formats whose decoders are so large that they run in a confined process only, also for trusted files.
CONFINED = ("AVIF", "HEIF")
#: Most pixels an image may have before it is decoded (300 MB as RGB).
MAX_IMAGE_PIXELS = 100_000_000
#: What Pillow raises for a file whose content is wrong.
DAMAGE = (OSError, ValueError, TypeError, SyntaxError, EOFError, MemoryError, LookupError, ArithmeticError,
          struct.error, RuntimeError)  # fmt: skip
#: From 16 bits to 8: the upper byte, as FFmpeg and OpenCV do.
_UPPER_BYTE = [level >> 8 for level in range(1 << 16)]


class DamagedPicture(WorkerError):
    """The file's content is wrong. The cause is Pillow's error; it may hold addresses, so clients do not see it."""

    def __init__(self) -> None:
        super().__init__("is damaged; download or export it again")


def open_picture(file: BinaryIO, pixel_limit: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image in a file, not decoded yet. Raises `WorkerError` for a format that is not read or too many pixels."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    # The decoder of HEIC gives what is there, and the rest of the picture black.
    if find_heif_format(head) in formats and ends_early(file):
        raise WorkerError("is cut short; download or export it again")
    try:
        with warnings.catch_warnings():
            # Our own limit replaces Pillow's warning; its hard limit still raises.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        raise WorkerError(f"has more than {pixel_limit:,} pixels; shrink it first") from None
    except DAMAGE:
        if find_heif_format(head) in formats:
            raise DamagedPicture from None
        raise WorkerError(f"is not an image that can be read; use one of {', '.join(FORMATS + CONFINED)}") from None
    width, height = image.size
    if width * height > pixel_limit:
        raise WorkerError(f"has {width}x{height} pixels, more than the limit of {pixel_limit:,}; shrink it first")
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. Fails for a PNG that is cut short before it."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except DAMAGE as error:
        raise DamagedPicture from error


def picture_count(image: Image.Image) -> int:
    """How many pictures a HEIF file holds of which one is the main one; 1 for other formats."""
    return int(getattr(image, "n_frames", 1)) if image.format == "HEIF" else 1


def upright(image: Image.Image, *, strict_official: bool = False) -> Image.Image:
    """The decoded image, turned by its EXIF, as `in_color` has it. `strict_official`: as stored, RGBA or RGB."""
    try:
        if strict_official:
            return image.convert("RGBA" if image.mode == "RGBA" else "RGB")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return in_color(image)
    except DAMAGE as error:
        raise DamagedPicture from error


def in_color(image: Image.Image) -> Image.Image:
    """RGBA of an image with transparency of any kind, RGB of any other. 16-bit levels keep their upper byte; 32-bit
    ones (modes I and F), which have no fixed range, stay as they are."""
    if image.mode in ("I", "F", "RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        clear, wide = image.info.get("transparency"), image.convert("I")
        color = wide.point(_UPPER_BYTE, "L").convert("RGB")
        if isinstance(clear, int):
            color.putalpha(wide.point([0 if level == clear else 255 for level in range(1 << 16)], "L"))
        return color
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
        assert converted is not None
        return converted
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
