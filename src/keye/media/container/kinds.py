"""What kind of file it is, judged by its content alone: an image, a video, or something that is neither.

Standard library only. A few bytes are looked at and sizes in headers followed; nothing is decoded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from keye.media.container import animations

#: How many of the first bytes tell the kind.
HEAD_BYTES = 4096

_PNG = b"\x89PNG\r\n\x1a\n"
_IMAGES = (_PNG, b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Brands of ISO files that hold still images; the sequence brands hold a track of pictures beside or instead of them.
_HEIF_STILLS = frozenset({b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2"})
_HEIF_SEQUENCES = frozenset({b"hevc", b"hevx", b"hevm", b"hevs", b"msf1"})
_AVIF = frozenset({b"avif", b"avis"})

_PICTURE, _SOUND, _MEDIUM = "save it as PNG or JPEG", "give a video", "give a video or an image"
_EXPORT = "export its pages or pictures as PNG and give those"
_UNPACK, _ITSELF = "unpack it and give the video or picture inside", "give the video itself"
#: What files are that are neither, what to do, and how they begin.
_OTHERS: tuple[tuple[str, str, tuple[bytes, ...]], ...] = (
    ("a PostScript document", _EXPORT, (b"%!PS", b"\xc5\xd0\xd3\xc6")),
    ("an office document", _EXPORT, (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf")),
    ("a RAR archive", _UNPACK, (b"Rar!",)),
    ("a 7z archive", _UNPACK, (b"7z\xbc\xaf\x27\x1c",)),
    ("a gzip archive", _UNPACK, (b"\x1f\x8b",)),
    ("a bzip2 archive", _UNPACK, (b"BZh",)),
    ("an xz archive", _UNPACK, (b"\xfd7zXZ\0",)),
    ("a zstd archive", _UNPACK, (b"\x28\xb5\x2f\xfd",)),
    ("a playlist", _ITSELF, (b"#EXTM3U", b"[playlist]", b"ffconcat")),
    ("a subtitle file", _ITSELF, (b"WEBVTT", b"[Script Info]")),
    ("a Photoshop picture", _PICTURE, (b"8BPS",)),
    ("a GIMP picture", _PICTURE, (b"gimp xcf",)),
    ("a JPEG XL picture", _PICTURE, (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    ("a JPEG 2000 picture", _PICTURE, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    ("a JPEG XR picture", _PICTURE, (b"II\xbc",)),
    ("a DDS picture", _PICTURE, (b"DDS ",)),
    ("an OpenEXR picture", _PICTURE, (b"v/1\x01",)),
    ("a Radiance picture", _PICTURE, (b"#?RADIANCE",)),
    ("a QOI picture", _PICTURE, (b"qoif",)),
    ("a BPG picture", _PICTURE, (b"BPG\xfb",)),
    ("a FLIF picture", _PICTURE, (b"FLIF",)),
    ("an ICNS picture", _PICTURE, (b"icns",)),
    ("a FITS picture", _PICTURE, (b"SIMPLE  =",)),
    ("a DPX picture", _PICTURE, (b"SDPX", b"XPDS")),
    ("a PCX picture", _PICTURE, (b"\x0a\x05\x01",)),
    ("an SGI picture", _PICTURE, (b"\x01\xda\0", b"\x01\xda\x01")),
    ("a WMF drawing", _PICTURE, (b"\xd7\xcd\xc6\x9a",)),
    ("a camera's raw picture", _PICTURE, (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"IIU\0")),
    ("an MNG animation", "convert it to WebP, GIF or MP4", (b"\x8aMNG\r\n",)),
    ("a sound file", _SOUND, (b"ID3", b"fLaC", b"wvpk", b"MAC ", b"#!AMR", b"caff", b"MThd", b".snd")),
    ("a sound file", _SOUND, (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xfa", b"\xff\xf1", b"\xff\xf9")),
    ("a font", _MEDIUM, (b"\0\x01\0\0\0", b"OTTO", b"wOFF", b"wOF2", b"ttcf")),
    ("a Flash program", _MEDIUM, (b"FWS", b"CWS", b"ZWS")),
    ("a program", _MEDIUM, (b"\x7fELF",)),
    ("a database", _MEDIUM, (b"SQLite format 3\0",)),
    ("an HDF5 file", _MEDIUM, (b"\x89HDF\r\n",)),
    ("a NumPy array", "load it and give the array", (b"\x93NUMPY",)),
    ("a file of model weights", _MEDIUM, (b"GGUF",)),
)
#: What stands in the first part of a ZIP archive that is a document.
_ZIPPED = {
    b"word/": "a Word document",
    b"ppt/": "a PowerPoint document",
    b"xl/": "an Excel document",
    b"[Content_Types].xml": "an office document",
    b"mimetypeapplication/vnd.oasis": "an office document",
    b"mimetypeapplication/epub": "an e-book",
}
_NETPBM = re.compile(rb"P[1-7fF]\s+(#|\d|WIDTH)")
_SUBTITLE = re.compile(rb"\s*\d+\s+\d\d:\d\d:\d\d[,.]\d+ *--> *\d\d:|\{\d+\}\{\d+\}|<SAMI>", re.IGNORECASE)
_MARKUP = (
    (re.compile(rb"<svg[\s>]", re.IGNORECASE), "an SVG drawing", "export it as PNG"),
    (re.compile(rb"<!doctype html|<html[\s>]", re.IGNORECASE), "a web page", "save the video or picture on it"),
    (re.compile(rb"<(MPD|smil|asx|playlist)[\s>]", re.IGNORECASE), "a playlist", _ITSELF),
    (re.compile(rb"<tt[\s>]", re.IGNORECASE), "a subtitle file", _ITSELF),
)


@dataclass(frozen=True)
class Other:
    """A file that is neither an image nor a video: what it is, and what to do."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"is {self.what}, which is not read; {self.advice}"


def find_kind(file: BinaryIO) -> Literal["image", "video"] | Other:
    """The kind of an open file. Animations are videos; so is what is not known, for the decoder to judge."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "video" if animations.is_animated_gif(file) else "image"
    if head.startswith(b"RIFF"):
        if head[8:12] in (b"WAVE", b"RMID"):
            return Other("a sound file", _SOUND)
        return "image" if head[8:12] == b"WEBP" and not animations.is_animated_webp(file) else "video"
    if head[4:8] == b"ftyp":
        if head[8:12] == b"crx ":
            return Other("a camera's raw picture", _PICTURE)
        # Brands of sequences stand first in bursts too, which have pictures but no track; and what says to be a still
        # image first of all is one, whatever else it holds.
        sequence = head[8:12] in _HEIF_SEQUENCES | {b"avis"} and animations.is_track_file(file)
        return "video" if find_heif_format(head) is None or sequence else "image"
    if head.startswith((b"II", b"MM")) and _is_camera_raw(head):
        return Other("a camera's raw picture", _PICTURE)
    if head.startswith(_PNG):
        if animations.is_animated_png(file):
            return "video"
        if animations.is_png_sequence(file):
            return Other("a row of PNG pictures in one file", "save each to a file of its own, or make a video of them")
        return "image"
    if head.startswith(b"\xff\xd8\xff"):
        return "video" if animations.is_jpeg_sequence(file) else "image"
    if (head.startswith(_IMAGES) and not _is_text(head[:64])) or _is_icon(head):
        return "image"
    return _describe_other(head) or "video"


def is_image_format(head: bytes) -> bool:
    """Whether a file that begins like this is in a format for images, of which some can move."""
    return head.startswith((*_IMAGES, b"GIF8")) or head[8:12] == b"WEBP" or find_heif_format(head) is not None


def is_png_or_webp(head: bytes) -> bool:
    """Whether an animation that begins like this is read with Pillow."""
    return head.startswith(_PNG) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def find_heif_format(head: bytes) -> Literal["AVIF", "HEIF"] | None:
    """The image format of a file of the ISO family, None where it is a video or of another family."""
    if head[4:8] != b"ftyp":
        return None
    size = min(int.from_bytes(head[:4], "big"), len(head))
    major, brands = head[8:12], {head[place : place + 4] for place in range(16, size - 3, 4)}
    if major in _AVIF or (major in (b"mif1", b"mif2", b"miaf", b"msf1") and brands & _AVIF):
        return "AVIF"
    if major in _HEIF_STILLS | _HEIF_SEQUENCES or (major == b"miaf" and brands & _HEIF_STILLS):
        return "HEIF"
    return None


def _describe_other(head: bytes) -> Other | None:
    if b"%PDF-" in head[:1024]:
        return Other("a PDF document", "convert its pages to PNG and give those as images")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        content = next((what for mark, what in _ZIPPED.items() if mark in head), None)
        return Other(content, _EXPORT) if content else Other("a ZIP archive", _UNPACK)
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
    for what, advice, marks in _OTHERS:
        if text.startswith(marks):
            return Other(what, advice)
    return _describe_text(text)


def _describe_text(head: bytes) -> Other | None:
    if not head.startswith((b"\xff\xfe", b"\xfe\xff")) and (not _is_text(head) or head.startswith(b"YUV4MPEG2 ")):
        return None
    if _SUBTITLE.match(head):
        return Other("a subtitle file", _ITSELF)
    if head.lstrip().startswith(b"<"):
        for mark, what, advice in _MARKUP:
            if mark.search(head):
                return Other(what, advice)
    return Other("a text file", _MEDIUM)


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
    if head[2:4] not in (b"*\0", b"\0*"):
        return False
    tags = dict(_read_first_tags(head))
    return head[8:10] == b"CR" or 50706 in tags or (330 in tags and bool(tags.get(254, 0) & 1))


def _read_first_tags(head: bytes) -> Iterator[tuple[int, int]]:
    """Numbers and (short or long) values of the tags in the first directory of a TIFF file, up to the end of `head`."""
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
