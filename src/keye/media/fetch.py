"""The only place that opens what a user names: a path, a file://, http(s):// or data: URL, bytes. Knows no format.

The network is left to `download`, which only this module calls. Every failure is a `MediaError` of one sentence.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from keye.errors import MediaError
from keye.media.download import GIB, FetchLimits, download, shown
from keye.media.hosts import check_address

#: Largest video file, in bytes.
MAX_VIDEO_BYTES = 64 * GIB
#: Largest image file, in bytes.
MAX_IMAGE_BYTES = GIB // 2

#: The first bytes of an index of a video, which `keye index` writes. Its second half finds files copied as text.
INDEX_MAGIC = b"\x89KEYE INDEX\r\n\x1a\n\x00"

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")
#: Blocks of a GIF, of at most 255 bytes each, that are walked to tell an animation from a picture.
_MAX_GIF_BLOCKS = 200_000


@dataclass(frozen=True)
class Source:
    """Something that can be opened and read: a regular file (`path`) or bytes in memory (`data`).

    `keep` holds a temporary file at `path`, which is removed when the last source of it is gone. With `untrusted`, for
    what a stranger sent, images too are decoded in a confined process, as videos always are.
    """

    name: str
    size: int
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    keep: object = field(default=None, repr=False, compare=False)
    untrusted: bool = False

    def open(self) -> BinaryIO:
        """A new seekable binary stream at the beginning."""
        if self.data is not None:
            return io.BytesIO(self.data)
        assert self.path is not None
        try:
            return self.path.open("rb")
        except OSError as error:
            raise MediaError(f"{self.name} cannot be opened: {_reason(error)}; check its permissions") from None

    def open_file(self) -> BinaryIO:
        """Like `open`, but always backed by a file descriptor that a child process can inherit."""
        if self.data is None:
            return self.open()
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        file.write(self.data)
        file.seek(0)
        return file

    def head(self, count: int = 32) -> bytes:
        """The first `count` bytes."""
        with self.open() as file:
            return file.read(count)


def fetch_source(
    reference: str | os.PathLike[str] | bytes | Source,
    *,
    max_bytes: int = MAX_VIDEO_BYTES,
    limits: FetchLimits | None = None,
) -> Source:
    """Finds what the user named and checks that it can be read; downloads it if it is an http or https address.

    `reference` is a path, a URL (`file://`, `http://`, `https://`, `data:`), the bytes of a file, or a `Source`, which
    is checked for size only. Raises `MediaError` when it is missing, a directory, no regular file, empty, larger than
    `max_bytes`, or cannot be downloaded within `limits`.
    """
    source = _locate(reference, max_bytes, limits or FetchLimits())
    if source.size == 0:
        raise MediaError(f"{source.name} is empty (0 bytes); check that it was copied completely")
    if source.size > max_bytes:
        raise MediaError(
            f"{source.name} has {source.size / GIB:.2f} GiB, more than the limit of {max_bytes / GIB:g} GiB; "
            "cut it into parts or re-encode it"
        )
    return source


_OWNERS = FetchLimits()
_STRANGERS = FetchLimits(download_bytes=2 * GIB, total_seconds=120.0, idle_seconds=10.0, redirects=3)


@dataclass(frozen=True)
class FetchPolicy:
    """What somebody who is not trusted with this machine may name: `data:` URLs, and http(s) addresses of `hosts`
    (`keye.media.hosts.parse_host_rule`), which are none unless given. Never a path, a file: URL or another scheme.

    `video_bytes` and `image_bytes` limit one file, `list_frames` the pictures in one data URL. `limits` is for
    addresses; its `hosts` are replaced by these.
    """

    hosts: tuple[str, ...] = ()
    video_bytes: int = 2 * GIB
    image_bytes: int = GIB // 16
    list_frames: int = 1024
    limits: FetchLimits = _STRANGERS

    def fetch(self, reference: object, kind: str = "video") -> Source:
        """The file that a request names by a `data:` URL or an address; `kind` is `"image"` or `"video"`."""
        text = self._checked(reference)
        most = self.image_bytes if kind == "image" else self.video_bytes
        if text[:5].lower() == "data:":
            _check_data(text, kind, most)
        return untrusted(fetch_source(text, max_bytes=most, limits=replace(self.limits, hosts=self.hosts)))

    def fetch_list(self, reference: object) -> list[Source] | None:
        """The pictures in a data URL that holds several (see `jpeg_list`); None for any other reference."""
        text = self._checked(reference)
        if text[:5].lower() != "data:" or text.count(",") < 1:
            return None
        count = text.count(",")
        if count > self.list_frames:
            raise MediaError(
                f"the data: URL holds {count:,} pictures, more than the limit of {self.list_frames:,}; "
                "send fewer, or a video file"
            )
        pictures = jpeg_list(text)
        if pictures is None:
            return None
        return [untrusted(fetch_source(picture, max_bytes=self.image_bytes)) for picture in pictures]

    def _checked(self, reference: object) -> str:
        if not isinstance(reference, str):
            raise MediaError("a medium is named by a file id, a data: URL or an address, as text")
        scheme = reference.partition(":")[0].lower() if ":" in reference else ""
        if scheme not in ("data", "http", "https"):
            raise MediaError("files of the server cannot be named; upload the file, or send it as a data: URL")
        if scheme != "data":
            check_address(reference, self.hosts)
        return reference


@dataclass(frozen=True)
class OwnersPolicy(FetchPolicy):
    """What somebody may name to whom this machine belongs: whatever `fetch_source` opens, by `limits`."""

    limits: FetchLimits = _OWNERS

    def fetch(self, reference: object, kind: str = "video") -> Source:
        most = MAX_IMAGE_BYTES if kind == "image" else MAX_VIDEO_BYTES
        return fetch_source(self._checked(reference), max_bytes=most, limits=self.limits)

    def _checked(self, reference: object) -> str:
        if not isinstance(reference, str):
            raise MediaError("a medium is named by a path, a data: URL or an address, as text")
        return reference


def untrusted(source: Source) -> Source:
    """A source whose content came from a stranger, such as an uploaded file: decoded in confined processes only."""
    return replace(source, untrusted=True)


def media_kind(source: Source) -> str:
    """`"image"` or `"video"`, judged by the first bytes. Animated GIFs count as video; unknown bytes too."""
    head = source.head()
    if _is_still(head):
        return "image"
    if head.startswith((b"GIF87a", b"GIF89a")) and not _animated_gif(source):
        return "image"
    return "video"


def is_index(source: Source) -> bool:
    """Whether this is an index of a video instead of a medium, judged by the first bytes."""
    return source.head(len(INDEX_MAGIC)) == INDEX_MAGIC


def jpeg_list(reference: object) -> list[bytes] | None:
    """The files in a data URL that holds several, parted by commas (`data:video/jpeg;base64,FIRST,SECOND,...`), which
    is how clients send the frames of a video; None for anything else. Base64 itself has no commas."""
    if not isinstance(reference, str) or reference[:5].lower() != "data:":
        return None
    header, _, body = reference.partition(",")
    if not header.lower().endswith(";base64") or ("," not in body and not header.lower().startswith("data:video/jpeg")):
        return None
    return [_base64(part) for part in body.split(",")]


def _locate(reference: str | os.PathLike[str] | bytes | Source, max_bytes: int, limits: FetchLimits) -> Source:
    if isinstance(reference, Source):
        return reference
    if isinstance(reference, bytes | bytearray | memoryview):
        return Source("<bytes>", len(reference), data=bytes(reference))
    text = os.fspath(reference)
    scheme = text.split(":", 1)[0].lower() if ":" in text else ""
    if scheme in ("http", "https"):
        file, size = download(text, limits, max_bytes, max_bytes_of=_max_bytes_of)
        return Source(shown(text).rpartition("/")[2] or shown(text), size, path=Path(file.name), keep=file)
    if scheme in ("ftp", "rtsp", "rtmp"):
        raise MediaError(f"{_short(text)} is a {scheme} address; download it first and pass the file")
    if scheme == "data":
        data = _data_url(text)
        return Source("<data URL>", len(data), data=data)
    if scheme == "file":
        text = _file_url(text)
    return _file(text)


def _file(text: str) -> Source:
    path = Path(text).expanduser()
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MediaError(f"{_short(text)} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{_short(text)} cannot be opened: {_reason(error)}; check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{_short(text)} is a directory; name a file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{_short(text)} is no regular file; save its content to a file first")
    source = Source(path.name, status.st_size, path=path)
    source.open().close()
    return source


def _file_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{_short(text)} names another machine; copy the file here and pass its path")
    return url2pathname(parts.path)


def _data_url(text: str) -> bytes:
    header, comma, body = text.partition(",")
    if not comma:
        raise MediaError("the data: URL has no comma; write it as data:<type>;base64,<data>")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    return _base64(body)


def _check_data(text: str, kind: str, most: int) -> None:
    """A `data:` URL of a picture or video, in base64, of at most `most` bytes: found out before it is decoded."""
    header, _, body = text[5:].partition(",")
    declared, *parameters = header.lower().split(";")
    animation = kind == "video" and declared == "image/gif"
    if declared and declared.partition("/")[0] not in (kind, "application") and not animation:
        raise MediaError(f"the data: URL does not say that it holds {_an(kind)}; write data:{kind}/...;base64,...")
    if "base64" not in parameters:
        raise MediaError("the data: URL must be in base64; write data:<type>;base64,<data>")
    if len(body) // 4 * 3 > most + 2:
        raise MediaError(f"the data: URL holds more than the limit of {most / GIB:.3g} GiB; upload the file instead")


def _an(kind: str) -> str:
    return "an image" if kind == "image" else "a video"


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the data: URL is no valid base64; encode the file again") from None


def _animated_gif(source: Source) -> bool:
    """Whether a GIF has a second image: walks its blocks without decoding. One with too many counts as animated."""
    with source.open() as file:
        header = file.read(13)
        if len(header) < 13:
            return False
        _skip_color_table(file, header[10])
        images = 0
        blocks = 0
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
                if blocks > _MAX_GIF_BLOCKS:
                    return True
    return False


def _is_still(head: bytes) -> bool:
    return head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _max_bytes_of(head: bytes) -> int:
    """How large a file with these first bytes may be."""
    return MAX_IMAGE_BYTES if _is_still(head) else MAX_VIDEO_BYTES


def _skip_color_table(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
