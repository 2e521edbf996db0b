"""Whether a file of an image format moves: its blocks are walked, nothing is decoded. Standard library only."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

#: Blocks of a GIF, of at most 255 bytes each, that are walked; one with more counts as animated.
MAX_BLOCKS = 200_000
#: Chunks of other files that are walked to tell their kind.
_MAX_CHUNKS = 10_000
#: How much of a JPEG file is searched for a second picture behind the first, and how much at once.
_MAX_JPEG, _JPEG_PIECE = 64 << 20, 1 << 20
#: Pages of a TIFF file that are counted, and tags that a page may have.
_MAX_PAGES, _MAX_TAGS = 10_000, 65_535
_NEW_SUBFILE_TYPE = 254
#: Shorter times, in seconds, are shown as long as `_USUAL`, as browsers do.
_SHORTEST, _USUAL = Fraction(11, 1000), Fraction(1, 10)


def is_animated_gif(file: BinaryIO, max_blocks: int = MAX_BLOCKS) -> bool:
    """Whether a GIF has a second image."""
    file.seek(0)
    header = file.read(13)
    if len(header) < 13:
        return False
    _skip_color_table(file, header[10])
    images = blocks = 0
    while introducer := file.read(1):
        if introducer == b"\x2c":
            images += 1
            descriptor = file.read(9)
            if images == 2 or len(descriptor) < 9:
                return images == 2
            _skip_color_table(file, descriptor[8])
            file.seek(1, os.SEEK_CUR)
        elif introducer == b"\x21":
            file.seek(1, os.SEEK_CUR)
        else:
            return False
        while (size := file.read(1)) and size != b"\x00":
            file.seek(size[0], os.SEEK_CUR)
            blocks += 1
            if blocks > max_blocks:
                return True
    return False


def is_animated_webp(file: BinaryIO) -> bool:
    """Whether a WebP has a second frame."""
    count = 0
    try:
        for name, _, _ in _webp_chunks(file, _MAX_CHUNKS):
            count += name == b"ANMF"
            if count == 2:
                return True
    except ValueError:  # Cut short: more may have followed.
        return count > 0
    return False


def is_animated_png(file: BinaryIO) -> bool:
    """Whether a PNG is an animation (APNG) of more than one frame."""
    for name, place, length in _png_chunks(file, _MAX_CHUNKS):
        if name == b"IDAT":
            return False
        if name == b"acTL" and length >= 8:
            file.seek(place)
            return int.from_bytes(file.read(4), "big") > 1
    return False


def is_png_sequence(file: BinaryIO) -> bool:
    """Whether another PNG follows the first in the same file."""
    place = 8
    for _, at, length in _png_chunks(file, _MAX_CHUNKS):
        place = at + length + 4
    file.seek(place)
    tail = file.read(20)
    return tail[4:8] == b"IEND" and tail[12:] == b"\x89PNG\r\n\x1a\n"


def is_track_file(file: BinaryIO) -> bool:
    """Whether a file of the ISO family has tracks (a `moov` box)."""
    file.seek(0, os.SEEK_END)
    end, place = file.tell(), 0
    for _ in range(_MAX_CHUNKS):
        file.seek(place)
        header = file.read(16)
        if len(header) < 8:
            return False
        if header[4:8] == b"moov":
            return True
        size = int.from_bytes(header[:4], "big")
        size = int.from_bytes(header[8:16], "big") if size == 1 else size
        if size < 8 or place + size > end:
            return False
        place += size
    return False


def is_jpeg_sequence(file: BinaryIO) -> bool:
    """Whether pictures of one size follow one another in a JPEG file, as in a raw MJPEG stream. A second picture that a
    camera declares (MPF) does not count."""
    first = _jpeg_picture(file, 0)
    if first is None:
        return False
    second = _jpeg_picture(file, first[1])
    return second is not None and second[0] == first[0]


def tiff_pages(file: BinaryIO) -> int:
    """The pages of a TIFF file, without masks and smaller copies of pages; 0 of any other file."""
    file.seek(0)
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None or len(start) < 16 or struct.unpack_from(order + "H", start, 2)[0] not in (42, 43):
        return 0
    big = start[2:4] in (b"+\0", b"\0+")
    count_form, place_form, entry, header = ("Q", "Q", 20, 8) if big else ("H", "I", 12, 4)
    (place,) = struct.unpack_from(order + place_form, start, header)
    pages, seen = 0, set[int]()
    while place and place not in seen and len(seen) < _MAX_PAGES:
        seen.add(place)
        file.seek(place)
        data = file.read(struct.calcsize(count_form))
        if len(data) < struct.calcsize(count_form):
            break
        (tags,) = struct.unpack(order + count_form, data)
        if not 0 < tags <= _MAX_TAGS:
            break
        size = tags * entry + struct.calcsize(place_form)
        data = file.read(size)
        if len(data) < size:
            break
        pages += not _subfile_type(data, tags, entry, order) & 0b101
        (place,) = struct.unpack_from(order + place_form, data, tags * entry)
    return pages


def _subfile_type(directory: bytes, tags: int, entry: int, order: str) -> int:
    """The tag that tells copies and masks from pages, 0 where it is missing."""
    for at in range(0, tags * entry, entry):
        if struct.unpack_from(order + "H", directory, at)[0] == _NEW_SUBFILE_TYPE:
            return int(struct.unpack_from(order + "I", directory, at + entry - (8 if entry == 20 else 4))[0])
    return 0


def is_webp(file: BinaryIO) -> bool:
    """Whether an open file is a WebP, moving or not."""
    file.seek(0)
    return file.read(12)[8:] == b"WEBP"


def webp_times(file: BinaryIO) -> list[Fraction]:
    """How long each frame of an animated WebP is shown, in seconds; `ValueError` where it is cut short."""
    times = []
    for name, place, length in _webp_chunks(file):
        if name == b"ANMF" and length >= 16:
            file.seek(place + 12)
            times.append(_display_seconds(int.from_bytes(file.read(3), "little"), 1000))
    return times


def png_times(file: BinaryIO) -> list[Fraction]:
    """How long each frame of an APNG is shown, in seconds; `ValueError` where it is cut short."""
    times: list[Fraction] = []
    declared = 0
    for name, place, length in _png_chunks(file):
        file.seek(place)
        if name == b"acTL" and length >= 8:
            declared = int.from_bytes(file.read(4), "big")
        elif name == b"fcTL" and length >= 26:
            delay, unit = struct.unpack("!HH", file.read(26)[20:24])
            times.append(_display_seconds(delay, unit or 100))
    if len(times) < declared:
        raise ValueError("fewer frames than declared")
    return times[:declared]


def _display_seconds(delay: int, unit: int) -> Fraction:
    time = Fraction(delay, unit)
    return time if time >= _SHORTEST else _USUAL


def _webp_chunks(file: BinaryIO, most: int = sys.maxsize) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of up to `most` chunks of a WebP; `ValueError` after one that is cut short."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(4)
    end, place = int.from_bytes(file.read(4), "little") + 8, 12
    for _ in range(most):
        if place + 8 > end:
            return
        file.seek(place)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if len(header) < 8:
            raise ValueError("cut short")
        yield header[:4], place + 8, length
        if place + 8 + length > size:
            raise ValueError("cut short")
        place += 8 + length + length % 2


def _png_chunks(file: BinaryIO, most: int = sys.maxsize) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of each chunk of a PNG as far as they go, of at most so many."""
    place = 8
    for _ in range(most):
        file.seek(place)
        header = file.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            return
        length = int.from_bytes(header[:4], "big")
        yield header[4:], place + 8, length
        place += 12 + length


def _jpeg_picture(file: BinaryIO, place: int) -> tuple[bytes, int] | None:
    """Size (as in the header) and end of the picture at a place; None if it is incomplete or declares more."""
    file.seek(place)
    if file.read(2) != b"\xff\xd8":
        return None
    size = b""
    for _ in range(_MAX_CHUNKS):
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF:
            return None
        length = int.from_bytes(marker[2:], "big") - 2
        if length < 0:
            return None
        body = file.read(length)
        if marker[1] == 0xE2 and body.startswith(b"MPF\0"):
            return None
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            size = body[1:5]
        if marker[1] == 0xDA:
            break
    end = _find(file, b"\xff\xd9", _MAX_JPEG)
    return (size, end) if size and end is not None else None


def _find(file: BinaryIO, mark: bytes, most: int) -> int | None:
    """Where a mark of two bytes ends, looked for in the next `most` bytes; None where it is not."""
    last = b""
    for _ in range(0, most, _JPEG_PIECE):
        begin = file.tell() - len(last)
        piece = last + file.read(_JPEG_PIECE)
        position = piece.find(mark)
        if position >= 0:
            return begin + position + len(mark)
        if len(piece) <= len(last):
            return None
        last = piece[-1:]
    return None


def _skip_color_table(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)
