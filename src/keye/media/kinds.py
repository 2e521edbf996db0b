"""What kind of file it is, judged by its content alone: an image, a video, or something that is neither.

Standard library only. A few bytes are looked at and sizes in headers followed; nothing is decoded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from keye.media.animations import (
    is_animated_gif,
    is_animated_png,
    is_animated_webp,
    is_jpeg_sequence,
    is_png_sequence,
    is_track_file,
)

#: How many of the first bytes tell the kind.
HEAD_BYTES = 4096

_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Brands of ISO files that hold still images; the sequence brands hold a track of pictures beside or instead of them.
_HEIF_STILLS = frozenset({b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2"})
_HEIF_SEQUENCES = frozenset({b"hevc", b"hevx", b"hevm", b"hevs", b"msf1"})
_AVIF = frozenset({b"avif", b"avis"})

_PICTURE = "save it as PNG or JPEG"
_EXPORT = "export its pages or pictures as PNG and give those"
_UNPACK = "unpack it and give the video or picture inside"
_NAMED = "give the video itself"
_SOUND = "sound alone is not read; give a video"
#: First bytes of files that are neither: what they are, and what to do.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"%!PS", "a PostScript document", _EXPORT), (b"\xc5\xd0\xd3\xc6", "a PostScript document", _EXPORT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", _EXPORT), (b"{\\rtf", "an office document", _EXPORT),
    (b"Rar!", "a RAR archive", _UNPACK), (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\x1f\x8b", "a gzip archive", _UNPACK), (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK), (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"#EXTM3U", "a playlist", _NAMED), (b"[playlist]", "a playlist", _NAMED), (b"ffconcat", "a playlist", _NAMED),
    (b"WEBVTT", "a subtitle file", _NAMED), (b"[Script Info]", "a subtitle file", _NAMED),
    (b"8BPS", "a Photoshop picture", _PICTURE), (b"gimp xcf", "a GIMP picture", _PICTURE),
    (b"\xff\x0a", "a JPEG XL picture", _PICTURE), (b"\0\0\0\x0cJXL ", "a JPEG XL picture", _PICTURE),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture", _PICTURE), (b"\xff\x4f\xff\x51", "a JPEG 2000 picture", _PICTURE),
    (b"II\xbc", "a JPEG XR picture", _PICTURE), (b"DDS ", "a DDS picture", _PICTURE),
    (b"v/1\x01", "an OpenEXR picture", _PICTURE), (b"#?RADIANCE", "a Radiance picture", _PICTURE),
    (b"qoif", "a QOI picture", _PICTURE), (b"BPG\xfb", "a BPG picture", _PICTURE), (b"FLIF", "a FLIF picture", _PICTURE),
    (b"icns", "an ICNS picture", _PICTURE), (b"SIMPLE  =", "a FITS picture", _PICTURE), (b"SDPX", "a DPX picture", _PICTURE),
    (b"XPDS", "a DPX picture", _PICTURE), (b"\x8aMNG\r\n", "an MNG animation", "convert it to WebP, GIF or MP4"),
    (b"\x0a\x05\x01", "a PCX picture", _PICTURE), (b"\x01\xda\0", "an SGI picture", _PICTURE),
    (b"\x01\xda\x01", "an SGI picture", _PICTURE), (b"\xd7\xcd\xc6\x9a", "a WMF drawing", _PICTURE),
    (b"FUJIFILMCCD-RAW", "a camera's raw picture", _PICTURE), (b"IIRO", "a camera's raw picture", _PICTURE),
    (b"IIRS", "a camera's raw picture", _PICTURE), (b"IIU\0", "a camera's raw picture", _PICTURE),
    (b"ID3", "a sound file", _SOUND), (b"fLaC", "a sound file", _SOUND), (b"wvpk", "a sound file", _SOUND),
    (b"MAC ", "a sound file", _SOUND), (b"#!AMR", "a sound file", _SOUND), (b"caff", "a sound file", _SOUND),
    (b"MThd", "a sound file", _SOUND), (b".snd", "a sound file", _SOUND), (b"\xff\xfb", "a sound file", _SOUND),
    (b"\xff\xf3", "a sound file", _SOUND), (b"\xff\xf2", "a sound file", _SOUND), (b"\xff\xfa", "a sound file", _SOUND),
    (b"\xff\xf1", "a sound file", _SOUND), (b"\xff\xf9", "a sound file", _SOUND),
    (b"\0\x01\0\0\0", "a font", _NAMED), (b"OTTO", "a font", _NAMED), (b"wOFF", "a font", _NAMED),
    (b"wOF2", "a font", _NAMED), (b"ttcf", "a font", _NAMED), (b"FWS", "a Flash program", _NAMED),
    (b"CWS", "a Flash program", _NAMED), (b"ZWS", "a Flash program", _NAMED), (b"\x7fELF", "a program", _NAMED),
    (b"SQLite format 3\0", "a database", _NAMED), (b"\x89HDF\r\n", "an HDF5 file", _NAMED),
    (b"\x93NUMPY", "a NumPy array", "load it and give the array"), (b"GGUF", "model weights", _NAMED),
)  # fmt: skip
_OFFICE = {b"word/": "a Word document", b"ppt/": "a PowerPoint document", b"xl/": "an Excel document",
           b"mimetypeapplication/vnd.oasis": "an office document", b"mimetypeapplication/epub": "an e-book"}  # fmt: skip
_NETPBM = re.compile(rb"P[1-7fF]\s+(#|\d|WIDTH)")
_SUBTITLE = re.compile(rb"\s*\d+\s+\d\d:\d\d:\d\d[,.]\d+ *--> *\d\d:|\{\d+\}\{\d+\}|<SAMI>", re.IGNORECASE)
_MARKUP = (
    (re.compile(rb"<svg[\s>]", re.IGNORECASE), "an SVG drawing", "export it as PNG"),
    (re.compile(rb"<!doctype html|<html[\s>]", re.IGNORECASE), "a web page", "save the video or picture on it"),
    (re.compile(rb"<(MPD|smil|asx|playlist)[\s>]", re.IGNORECASE), "a playlist", _NAMED),
    (re.compile(rb"<tt[\s>]", re.IGNORECASE), "a subtitle file", _NAMED),
)
_PDF = "convert its pages to PNG and give those as images"


@dataclass(frozen=True)
class Other:
    """A file that is neither an image nor a video: what it is, and what to do."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"is {self.what}, which is not read; {self.advice}"


def kind_of(file: BinaryIO) -> Literal["image", "video"] | Other:
    """The kind of an open file. Animations are videos; so is what is not known, for the decoder to judge."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "video" if is_animated_gif(file) else "image"
    if head.startswith(b"RIFF"):
        return _riff(head, file)
    if head[4:8] == b"ftyp":
        return _iso(head, file)
    if head.startswith((b"II", b"MM")) and _is_camera_raw(head):
        return Other("a camera's raw picture", _PICTURE)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(file)
    if head.startswith(b"\xff\xd8\xff"):
        return "video" if is_jpeg_sequence(file) else "image"
    if (head.startswith(_IMAGES) and not _is_text(head[:64])) or _is_icon(head):
        return "image"
    return _other(head) or "video"


def may_be_image(head: bytes) -> bool:
    """Whether a file that begins like this is in a format for images, of which some can move."""
    return head.startswith(_IMAGES) or head[8:12] == b"WEBP" or heif_format(head) is not None


def heif_format(head: bytes) -> Literal["AVIF", "HEIF"] | None:
    """The image format of a file of the ISO family, None where it is a video or of another family."""
    if head[4:8] != b"ftyp":
        return None
    major, brands = _brands(head)
    if major in _AVIF or (major in (b"mif1", b"mif2", b"miaf", b"msf1") and brands & _AVIF):
        return "AVIF"
    if major in _HEIF_STILLS | _HEIF_SEQUENCES or (major == b"miaf" and brands & _HEIF_STILLS):
        return "HEIF"
    return None


def _brands(head: bytes) -> tuple[bytes, set[bytes]]:
    size = min(int.from_bytes(head[:4], "big"), len(head))
    return head[8:12], {head[place : place + 4] for place in range(16, size - 3, 4)}


def _iso(head: bytes, file: BinaryIO) -> Literal["image", "video"] | Other:
    major, brands = _brands(head)
    if major == b"crx ":
        return Other("a camera's raw picture", _PICTURE)
    if heif_format(head) is None:
        return "video"
    # Brands of sequences stand first in bursts too, which have pictures but no track; and what says to be a still
    # image first of all is one, whatever else it holds.
    sequence = major in _HEIF_SEQUENCES | {b"avis"}
    return "video" if sequence and is_track_file(file) else "image"


def _png(file: BinaryIO) -> Literal["image", "video"] | Other:
    if is_animated_png(file):
        return "video"
    if is_png_sequence(file):
        return Other("a row of PNG pictures in one file", "save each to a file of its own, or make a video of them")
    return "image"


def _riff(head: bytes, file: BinaryIO) -> Literal["image", "video"] | Other:
    if head[8:12] == b"WEBP":
        return "video" if is_animated_webp(file) else "image"
    if head[8:12] in (b"WAVE", b"RMID"):
        return Other("a sound file", _SOUND)
    return "video"


def _other(head: bytes) -> Other | None:
    if b"%PDF-" in head[:1024]:
        return Other("a PDF document", _PDF)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        found = next((what for mark, what in _OFFICE.items() if mark in head), None)
        return Other(found, _EXPORT) if found else Other("a ZIP archive", _UNPACK)
    if head[128:132] == b"DICM":
        return Other("a DICOM picture", _PICTURE)
    if head[257:262] == b"ustar":
        return Other("a TAR archive", _UNPACK)
    if head.startswith(b"FORM") and head[8:12] in (b"AIFF", b"AIFC"):
        return Other("a sound file", _SOUND)
    if head[40:44] == b" EMF" and head.startswith(b"\x01\0\0\0"):
        return Other("an EMF drawing", _PICTURE)
    if _NETPBM.match(head):
        return Other("a Netpbm picture", _PICTURE)
    text = head.removeprefix(b"\xef\xbb\xbf")
    for mark, what, advice in _OTHERS:
        if text.startswith(mark):
            return Other(what, advice)
    return _text(text)


def _text(head: bytes) -> Other | None:
    if not head.startswith((b"\xff\xfe", b"\xfe\xff")) and (not _is_text(head) or head.startswith(b"YUV4MPEG2 ")):
        return None
    if _SUBTITLE.match(head):
        return Other("a subtitle file", _NAMED)
    if head.lstrip().startswith(b"<"):
        for mark, what, advice in _MARKUP:
            if mark.search(head):
                return Other(what, advice)
    return Other("a text file", "give a video or an image")


def _is_text(head: bytes) -> bool:
    """Whether bytes are text in UTF-8, or in a form in which nearly all letters are ASCII."""
    if not head or any(byte < 32 and byte not in b"\t\n\r\f\x1a\x1b" for byte in head):
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 or sum(byte < 127 for byte in head) > 0.95 * len(head)
    return True


def _is_icon(head: bytes) -> bool:
    """An ICO file: its count of pictures and the reserved byte and place of the first."""
    if head[:4] != b"\0\0\x01\0" or len(head) < 22:
        return False
    count, reserved, place = struct.unpack_from("<H3xB8xI", head, 4)
    return 0 < count <= 256 and reserved == 0 and place == 6 + 16 * count


def _is_camera_raw(head: bytes) -> bool:
    """Whether a TIFF file is the raw picture of a camera, which Pillow would open as the thumbnail in front of it."""
    if head[8:10] == b"CR":
        return True
    tags = dict(first_tags(head))
    return 50706 in tags or (330 in tags and bool(tags.get(254, 0) & 1))


def first_tags(head: bytes) -> Iterator[tuple[int, int]]:
    """The numbers and (short or long) values of the tags in the first directory of a TIFF file, as far as `head`
    holds it."""
    order = "<" if head[:2] == b"II" else ">"
    if len(head) < 8 or struct.unpack_from(order + "H", head, 2)[0] != 42:
        return
    (place,) = struct.unpack_from(order + "I", head, 4)
    if place + 2 > len(head):
        return
    (count,) = struct.unpack_from(order + "H", head, place)
    for at in range(place + 2, min(place + 2 + 12 * count, len(head) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", head, at)
        yield tag, struct.unpack_from(order + ("H" if kind == 3 else "I"), head, at + 8)[0]
