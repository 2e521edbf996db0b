"""Whether a media file ends before it says that it does, by the sizes in its own structure. Standard library only.

A declared duration says less: that of a whole recording stands in each of its pieces."""

from __future__ import annotations

import os
from typing import BinaryIO

#: Boxes or chunks that are looked at; a recording of a day in fragments of a second has 172,800.
_MOST = 200_000
#: Bytes at the end that may be padding.
_TAIL = 1 << 12
#: Flash video: bytes of the header of a tag, and its kinds: sound, pictures, data.
_TAG_HEADER, _TAGS = 11, (b"\x08", b"\x09", b"\x12")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def ends_early(file: BinaryIO) -> bool | None:
    """Whether bytes are missing at the end of a file; None where its format, or the file, does not tell."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(12)
    try:
        if start[4:8] in (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip"):
            return _boxes(file, end)
        if start.startswith(_EBML):
            return _segment(file, end)
        if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
            return _chunks(file, end)
        if start.startswith(b"FLV"):
            # It ends with a complete tag and its size.
            file.seek(max(end - 4, 0))
            size = int.from_bytes(file.read(4), "big")
            if not _TAG_HEADER <= size <= end:
                return True
            file.seek(max(end - 4 - size, 0))
            header = file.read(4)
            return header[:1] not in _TAGS or int.from_bytes(header[1:], "big") + _TAG_HEADER != size
        if start.startswith((b"GIF87a", b"GIF89a")):
            file.seek(max(end - _TAIL, 0))
            return not file.read().rstrip(b"\0").endswith(b";")
    finally:
        file.seek(0)
    return None


def _boxes(file: BinaryIO, end: int) -> bool | None:
    place = 0
    for _ in range(_MOST):
        if place == end:
            return False
        file.seek(place)
        header = file.read(16)
        size = int.from_bytes(header[8:16] if int.from_bytes(header[:4], "big") == 1 else header[:4], "big")
        if size == 0:  # up to the end
            return False
        if size < 8 or not header[4:8].isascii():
            return None
        place += size
        if place > end:
            return True
    return None


def _segment(file: BinaryIO, end: int) -> bool | None:
    file.seek(len(_EBML))
    header = _number(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return None
    size = _number(file)
    return None if size is None else file.tell() + size > end


def _number(file: BinaryIO) -> int | None:
    """A number of EBML: the leading zero bits of its first byte tell how many bytes follow. All ones: not known."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 8 - first[0].bit_length()
    rest = file.read(length)
    value = int.from_bytes(bytes([first[0] & (0x7F >> length)]) + rest, "big")
    return None if len(rest) < length or value == (1 << 7 * (length + 1)) - 1 else value


def _chunks(file: BinaryIO, end: int) -> bool | None:
    place = 0
    for _ in range(_MOST):
        file.seek(place)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or size == 0:
            return False if place else None
        place += 8 + size + size % 2
        if place > end + 1:
            return True
    return None
