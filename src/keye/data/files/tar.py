"""Tar archives of samples, as webdataset names them: neighbouring members with the same name up to its first dot are
one row. Media stay in the archive and are read where they lie."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np

from keye.data.files.lines import decode
from keye.data.files.raw import MAX_ROW, Raw
from keye.data.files.rows import Offsets, Row, parse_object
from keye.data.samples import BadRow, Place
from keye.errors import KeyeError
from keye.media.source.fetch import Part, Source
from keye.units import MIB, format_bytes

_BLOCK: Final = 512
#: Longest name or list of attributes before a member.
_MAX_EXTRA: Final = MIB
MAX_MEMBERS: Final = 4096
IMAGES: Final = frozenset("jpg jpeg png webp bmp gif tif tiff avif heic jfif ppm pgm".split())
VIDEOS: Final = frozenset("mp4 m4v mov mkv webm avi mpg mpeg ts wmv flv".split())
SOUNDS: Final = frozenset("wav mp3 flac ogg opus m4a aac".split())
_TEXTS: Final = ("txt", "text", "caption")


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    header: int

    @property
    def key(self) -> str:
        folder, _, name = self.name.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}"

    @property
    def ending(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarRows:
    """The rows of an archive, plain or compressed by gzip (then its media are unpacked with every row)."""

    kind = "tar"
    window = 1

    def __init__(self, raw: Raw) -> None:
        self.raw, self.path = raw, raw.path
        if raw.edges:
            raise KeyeError(f"{raw.path} is a compressed archive, in which no row can be found; unpack it to .tar")
        starts, digest, last = array("q"), hashlib.blake2b(digest_size=16), None
        for member in self._members(0):
            digest.update(f"{member.name} {member.offset} {member.size}\n".encode(errors="replace"))
            if member.key != last:
                starts.append(member.header)
                last = member.key
        self._starts = np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def blocks(self) -> Offsets | None:
        return None

    def place(self, index: int) -> Place:
        return Place(str(self.path), index + 1)

    def read(self, index: int) -> Row:
        fields: dict[str, Any] = {}
        images, videos, sources = list[str](), list[str](), dict[str, Source]()
        for member in self._group(int(self._starts[index])):
            kind = member.ending.rpartition(".")[2]
            if kind == "json":
                fields |= parse_object(self._content(member), "member " + member.name)
            elif kind in _TEXTS or kind in ("cls", "key"):
                fields["text" if kind in _TEXTS else kind] = decode(self._content(member)).strip()
            elif kind in IMAGES | VIDEOS:
                (images if kind in IMAGES else videos).append(member.name)
                source = Source(member.name, member.size, part=Part(self.path, member.offset))
                if not member.size:
                    raise BadRow(f"the member {member.name} is empty")
                for name in (member.ending, PurePosixPath(member.name).name, member.name):
                    sources[name] = source
            elif kind in SOUNDS:
                fields["audio"] = member.name
        for singular, listed in (("image", images), ("video", videos)):
            if listed and not any(fields.get(name) for name in (singular, f"{singular}s")):
                fields[f"{singular}s"] = listed
        return Row(fields, self.place(index), sources)

    def _group(self, start: int) -> Iterator[_Member]:
        key = None
        for count, member in enumerate(self._members(start)):
            if key is not None and member.key != key:
                return
            if count >= MAX_MEMBERS:
                raise BadRow(f"the row has more than {MAX_MEMBERS:,} members")
            key = member.key
            yield member

    def _content(self, member: _Member) -> bytes:
        if member.size > MAX_ROW:
            raise BadRow(f"the member {member.name} has more than {format_bytes(MAX_ROW)}")
        return self.raw.read(member.offset, member.offset + member.size)

    def _members(self, place: int) -> Iterator[_Member]:
        """The files in the archive from a header on. `KeyeError` for bytes that are not a header."""
        name, size, first = "", None, place
        while len(header := self.raw.read(place, place + _BLOCK)) == _BLOCK and any(header[:_BLOCK]):
            if not _is_header(header):
                raise KeyeError(f"{self.path} is damaged at byte {place:,}; download it again")
            kind, length, content = header[156:157], _number(header[124:136]), place + _BLOCK
            if kind in (b"L", b"K", b"x", b"g"):
                if length > _MAX_EXTRA:
                    raise KeyeError(f"{self.path} has a name of {length:,} bytes at byte {place:,}")
                data = self.raw.read(content, content + length)
                if kind == b"L":
                    name = _text(data)
                elif kind == b"x":
                    values = dict(_attributes(data))
                    name = _text(values[b"path"]) if b"path" in values else name
                    size = int(values[b"size"]) if values.get(b"size", b"").isdigit() else size
            else:
                length = length if size is None else size
                prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[257:263] != b"ustar " else ""
                own = "/".join(part for part in (prefix, _text(header[:100])) if part)
                if content + length > self.raw.size:
                    raise KeyeError(f"{self.path} ends inside its member {name or own}; download it again")
                if kind in (b"0", b"\0", b"7") and not PurePosixPath(name or own).name.startswith("._"):
                    yield _Member((name or own).removeprefix("./"), content, length, first)
                name, size, first = "", None, -1
            place = content + -(-length // _BLOCK) * _BLOCK
            first = place if first < 0 else first
        if header[:1] not in (b"", b"\0") or place > self.raw.size:  # an archive ends with zeros, or behind a member
            raise KeyeError(f"{self.path} ends inside its headers; download it again")


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return len(head) >= _BLOCK and any(head[:_BLOCK]) and _is_header(head[:_BLOCK])


def _is_header(header: bytes) -> bool:
    """Whether the sum of a header's bytes is the one that stands in it."""
    expected = header[148:156].split(b"\0")[0].strip()
    if not expected or not set(expected) <= set(b"01234567"):
        return False
    return int(expected, 8) == sum(header) - sum(header[148:156]) + 8 * 32


def _number(digits: bytes) -> int:
    """A size: octal digits, or binary where the first bit is set."""
    if digits[0] & 0x80:
        return int.from_bytes(digits, "big") & ((1 << 94) - 1)
    text = digits.split(b"\0")[0].strip()
    return int(text, 8) if text and set(text) <= set(b"01234567") else 0


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode(errors="surrogateescape")


def _attributes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and values of "LENGTH NAME=VALUE" records."""
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits[:8]) <= len(data):
            return
        record, data = data[: int(digits)], data[int(digits) :]
        name, _, value = record[len(digits) + 1 :].rstrip(b"\n").partition(b"=")
        yield name, value
