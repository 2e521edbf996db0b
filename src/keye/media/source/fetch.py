"""The only place that opens what a user names: a path, a file://, http(s):// or data: URL, bytes. Knows no format.

The network is left to `download`, which only this module calls. Every failure is a `MediaError` of one sentence.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from keye.config.media import FetchLimits
from keye.errors import MediaError
from keye.media.container.kinds import Other, find_kind, is_image_format
from keye.media.source.hosts import check_address
from keye.units import GIB, format_bytes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

_SCHEME = "data:"
#: Longest type with parameters.
_MAX_HEADER = 4096
#: Letters that are decoded at once.
PIECE = 1 << 20
_BASE64 = re.compile(r";[ \t]*base64[ \t]*(?:;[^,;]*)*,", re.IGNORECASE)
#: A type and parameters; values that are not in quotes may hold commas.
_PARAMETERS = re.compile(r'[^;,"]*(?:;[^;,="]*(?:=(?:[ \t]*"[^"]*"[ \t]*|[^;"]*))?)*')
_PLAIN = re.compile(r'(?:"[^"]*"|[^",])*,')
_BLANKS = " \t\r\n\f"
_STANDARD = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class DataUrl:
    """A `data:` URL, taken apart. `media_type` is in lower case, without parameters, and empty where there is none; the
    content is `text` from `start` on."""

    media_type: str
    is_base64: bool
    text: str = field(repr=False)
    start: int

    @property
    def most_bytes(self) -> int:
        """Bytes that the content can have at most, from the number of its letters."""
        letters = len(self.text) - self.start - 2 * self.text.count("%", self.start)
        if not self.is_base64:
            return letters * (1 if self.text.isascii() else 4)
        blanks = sum(self.text.count(blank, self.start) for blank in _BLANKS)
        return (letters - blanks) * 3 // 4

    @property
    def parts(self) -> int:
        """How many files the content is, parted by commas: base64 has none of its own."""
        return 1 + self.text.count(",", self.start) if self.is_base64 else 1

    def decode(self, letters_at_once: int = PIECE) -> bytes:
        """The content. Raises `MediaError` for what is not base64."""
        return self._decode_base64(self.start, len(self.text), letters_at_once)

    def decode_parts(self) -> list[bytes]:
        """The files of a URL that holds several."""
        pieces, begin = [], self.start
        for _ in range(self.parts):
            end = self.text.find(",", begin) if self.is_base64 else -1
            end = len(self.text) if end < 0 else end
            pieces.append(self._decode_base64(begin, end))
            begin = end + 1
        return pieces

    def head(self, count: int) -> bytes:
        """The first bytes of the content, about `count`; empty where they cannot be decoded."""
        text = self.text[self.start : self.start + 6 * count]  # Escapes and line breaks take more than four thirds.
        if not self.is_base64:
            return _unescape(text)[:count]
        letters = _unescape(text.partition(",")[0]).translate(_STANDARD, _BLANKS.encode())
        try:
            return _decode_letters(letters[: 4 * (count // 3)])
        except MediaError:
            return b""

    def _decode_base64(self, begin: int, end: int, letters_at_once: int = PIECE) -> bytes:
        out, rest, padded = io.BytesIO(), b"", False
        while begin < end:
            stop = min(begin + letters_at_once, end)
            if stop < end and "%" in self.text[stop - 2 : stop]:
                stop = self.text.rindex("%", stop - 2, stop)  # An escape stays in one piece.
            piece = _unescape(self.text[begin:stop])
            begin = stop
            if not self.is_base64:
                out.write(piece)
                continue
            letters = rest + piece.translate(_STANDARD, _BLANKS.encode())
            if letters and padded:
                raise _explain_invalid()
            usable = len(letters) if begin == end else len(letters) // 4 * 4
            rest, padded = letters[usable:], b"=" in letters[:usable]
            out.write(_decode_letters(letters[:usable]))
        return out.getvalue()


def parse_data_url(reference: object) -> DataUrl | None:
    """A `data:` URL taken apart, None for anything else. Raises `MediaError` for one without a comma."""
    if not isinstance(reference, str) or reference[: len(_SCHEME)].lower() != _SCHEME:
        return None
    head = reference[len(_SCHEME) : len(_SCHEME) + _MAX_HEADER]
    mark = _BASE64.search(head)
    if mark is not None and _PARAMETERS.fullmatch(head[: mark.start()]):
        return DataUrl(_parse_type(head), True, reference, len(_SCHEME) + mark.end())
    plain = _PLAIN.match(head)
    if plain is None:
        raise MediaError("the data: URL has no comma; write it as data:<type>;base64,<data>")
    return DataUrl(_parse_type(head), False, reference, len(_SCHEME) + plain.end())


def decode_list(reference: object) -> list[bytes] | None:
    """The files in a data URL that holds several, parted by commas (`data:video/jpeg;base64,FIRST,SECOND,...`), which
    is how clients send the frames of a video; None for anything else."""
    url = parse_list(reference)
    return None if url is None else url.decode_parts()


def parse_list(reference: object) -> DataUrl | None:
    """A data URL that holds several files, or frames of a video of which there is one; None for anything else."""
    if not isinstance(reference, str) or "," not in reference:
        return None
    url = parse_data_url(reference)
    if url is None or not url.is_base64 or (url.parts == 1 and url.media_type != "video/jpeg"):
        return None
    return url


def _parse_type(head: str) -> str:
    return re.split("[;,]", head, maxsplit=1)[0].strip().lower()


def _unescape(text: str) -> bytes:
    return unquote_to_bytes(text) if "%" in text else text.encode(errors="replace")


def _decode_letters(letters: bytes) -> bytes:
    """Bytes of base64 in the standard alphabet, with or without padding."""
    if len(letters) % 4 > 1 and b"=" not in letters:
        letters += b"=" * (-len(letters) % 4)
    try:
        return base64.b64decode(letters, validate=True)
    except ValueError:
        raise _explain_invalid() from None


def _explain_invalid() -> MediaError:
    return MediaError("the data: URL is not valid base64; encode the file again")


#: Largest video file, in bytes.
MAX_VIDEO_BYTES = 64 * GIB
#: Largest image file, in bytes.
MAX_IMAGE_BYTES = GIB // 2

#: The first bytes of an index of a video, which `keye index` writes. Its second half finds files copied as text.
INDEX_MAGIC = b"\x89KEYE INDEX\r\n\x1a\n\x00"

#: Longest text that may be a path, in letters.
_LONGEST_PATH = 4096
#: Names of files that look like an address or like a home folder.
_ODD = re.compile(r"~|[A-Za-z][A-Za-z0-9+.-]*:")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Part:
    """Bytes of a file from `offset` on, such as a member of an archive."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Source:
    """Something that can be opened and read: a regular file (`path`), bytes in memory (`data`) or a part of a file, the
    `size` bytes of `part`.

    `keep` holds a temporary file at `path`, which is removed when the last source of it is gone. With `untrusted`, for
    untrusted files, images too are decoded in a confined process, as videos always are.
    """

    name: str
    size: int
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    keep: object = field(default=None, repr=False, compare=False)
    untrusted: bool = False
    part: Part | None = None

    def open(self) -> BinaryIO:
        """A new seekable binary stream at the beginning."""
        if self.data is not None:
            return io.BytesIO(self.data)
        path = self.part.path if self.part is not None else self.path
        assert path is not None
        try:
            if self.part is not None:
                return io.BufferedReader(_PartOfFile(path.open("rb", buffering=0), self.part.offset, self.size))
            return path.open("rb")
        except OSError as error:
            raise MediaError(f"{self.name} cannot be opened: {_reason(error)}; check its permissions") from None

    def open_file(self) -> BinaryIO:
        """Like `open`, but always backed by a file descriptor that a child process can inherit."""
        if self.path is not None:
            return self.open()
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        with self.open() as content:
            shutil.copyfileobj(content, file, PIECE)
        file.seek(0)
        return file

    def head(self, count: int = 32) -> bytes:
        """The first `count` bytes."""
        with self.open() as file:
            return file.read(count)


class _PartOfFile(io.RawIOBase):
    """The `size` bytes of an open file from `offset` on."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + place)
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        data = os.pread(
            self._file.fileno(), min(len(view), max(0, self._size - self._place)), self._offset + self._place
        )
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


#: What a user may give for a file: a path, a URL, the bytes of a file, or a source.
Reference: TypeAlias = str | os.PathLike[str] | bytes | Source


def fetch_source(
    reference: Reference, *, max_bytes: int = MAX_VIDEO_BYTES, limits: FetchLimits | None = None
) -> Source:
    """Finds what the user named and checks that it can be read; downloads it if it is an http or https address.

    `reference` is a path, a URL (`file://`, `http://`, `https://`, `data:`), the bytes of a file, or a `Source`, which
    is checked for size only. A file that exists is opened, whatever its name looks like. Raises `MediaError` when it is
    missing, a directory, no regular file, empty, larger than `max_bytes`, or cannot be downloaded within `limits`.
    """
    if isinstance(reference, Source):
        return _check_size(reference, max_bytes)
    if isinstance(reference, bytes | bytearray | memoryview):
        return _check_size(Source("<bytes>", len(reference), data=bytes(reference)), max_bytes)
    text = os.fspath(reference)
    source = None
    if len(text) <= _LONGEST_PATH and _ODD.match(text) and "\0" not in text and os.path.isfile(text):
        source = _file(text, expand=False)  # a name that looks like an address, a flag or another user's home
    source = source or _fetch(text, max_bytes, limits or FetchLimits())
    return _check_size(source or _file(_file_url(text) if text[:5].lower() == "file:" else text), max_bytes)


def _check_size(source: Source, max_bytes: int) -> Source:
    if source.size == 0:
        raise MediaError(f"{source.name} is empty (0 bytes); check that it was copied completely")
    if source.size > max_bytes:
        raise MediaError(
            f"{source.name} has {format_bytes(source.size)}, more than the limit of {format_bytes(max_bytes)}; "
            "cut it into parts or re-encode it"
        )
    return source


_OWNERS = FetchLimits()
_UNTRUSTED_LIMITS = FetchLimits(download_bytes=2 * GIB, total_seconds=120.0, idle_seconds=10.0, redirects=3)


@dataclass(frozen=True)
class FetchPolicy:
    """What an untrusted user may name: `data:` URLs, and http(s) addresses of `hosts`
    (`keye.media.source.hosts.parse_host_rule`), which are none unless given. Never a path, a file: URL or another
    scheme.

    `video_bytes` and `image_bytes` limit one file, `list_frames` the pictures in one data URL. `limits` is for
    addresses; its `hosts` are replaced by these.
    """

    hosts: tuple[str, ...] = ()
    video_bytes: int = 2 * GIB
    image_bytes: int = GIB // 16
    list_frames: int = 1024
    limits: FetchLimits = _UNTRUSTED_LIMITS

    def fetch(self, reference: object, kind: str = "video") -> Source:
        """The file that a request names by a `data:` URL or an address; `kind` is `"image"` or `"video"`."""
        text = self._checked(reference)
        most = self.image_bytes if kind == "image" else self.video_bytes
        url = parse_data_url(text)
        if url is not None:
            _check_data(url, kind, most)
        # Not `fetch_source`, which opens files of this machine.
        source = _fetch(text, most, replace(self.limits, hosts=self.hosts))
        assert source is not None, "an address of another kind passed the check"
        return untrusted(_check_size(source, most))

    def fetch_list(self, reference: object) -> list[Source] | None:
        """The pictures in a data URL that holds several (see `data_urls.parse_list`); None for any other reference."""
        url = parse_list(self._checked(reference))
        if url is None:
            return None
        if url.parts > self.list_frames:
            raise MediaError(
                f"the data: URL holds {url.parts:,} pictures, more than the limit of {self.list_frames:,}; "
                "send fewer, or a video file"
            )
        _check_data(url, "video", self.video_bytes)
        return [untrusted(fetch_source(picture, max_bytes=self.image_bytes)) for picture in url.decode_parts()]

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
    """Policy for the local user: whatever `fetch_source` opens, by `limits`."""

    limits: FetchLimits = _OWNERS

    def fetch(self, reference: object, kind: str = "video") -> Source:
        most = MAX_IMAGE_BYTES if kind == "image" else MAX_VIDEO_BYTES
        return fetch_source(self._checked(reference), max_bytes=most, limits=self.limits)

    def _checked(self, reference: object) -> str:
        if not isinstance(reference, str):
            raise MediaError("a medium is named by a path, a data: URL or an address, as text")
        return reference


def untrusted(source: Source) -> Source:
    """A source whose content is untrusted, such as an uploaded file: decoded in confined processes only."""
    return replace(source, untrusted=True)


def media_kind(source: Reference) -> str:
    """`"image"` or `"video"`, judged by the content. Animations are videos; so is what is not known, for the decoder to
    judge. Raises `MediaError` for what is neither, such as a PDF or a text file."""
    source = fetch_source(source)
    with source.open() as file:
        kind = find_kind(file)
    if isinstance(kind, Other):
        raise MediaError(f"{source.name} {kind}")
    return kind


def check_video(source: Source) -> None:
    """Raises `MediaError` for what is surely no video."""
    if media_kind(source) == "image":
        raise MediaError(f"{source.name} is an image, not a video; give it as an image")


def is_index(source: Source) -> bool:
    """Whether this is an index of a video instead of a medium, judged by the first bytes."""
    return source.head(len(INDEX_MAGIC)) == INDEX_MAGIC


def _fetch(text: str, max_bytes: int, limits: FetchLimits) -> Source | None:
    """What an address or a `data:` URL names; None for anything else. Opens no file of this machine."""
    url = parse_data_url(text)
    if url is not None:
        data = url.decode()
        return Source("<data URL>", len(data), data=data)
    scheme = text.partition(":")[0].lower() if ":" in text else ""
    if scheme in ("http", "https"):
        from keye.media.source.download import download, redact_url

        file, size = download(
            text, limits, max_bytes, lambda head: MAX_IMAGE_BYTES if is_image_format(head) else MAX_VIDEO_BYTES
        )
        return Source(redact_url(text).rpartition("/")[2] or redact_url(text), size, path=Path(file.name), keep=file)
    if scheme in ("ftp", "rtsp", "rtmp") or (scheme != "file" and _ADDRESS.match(text)):
        raise MediaError(f"{_short(text)} is a {scheme} address; download it first and pass the file")
    return None


def _file(text: str, *, expand: bool = True) -> Source:
    path = Path(text)
    try:
        path = path.expanduser() if expand else path
        status = path.stat()
    except RuntimeError:
        raise MediaError(f"{_short(text)} names the home of a user who is not known; check the path") from None
    except FileNotFoundError:
        raise MediaError(f"{_short(text)} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{_short(text)} cannot be opened: {_reason(error)}; check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{_short(text)} is a directory; name a file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{_short(text)} is not a regular file; save its content to a file first")
    source = Source(path.name, status.st_size, path=path)
    source.open().close()
    return source


def _file_url(text: str) -> str:
    """The path in a `file:` URL, in which `?`, `#` and `%` may stand unescaped."""
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{_short(text)} names another machine; copy the file here and pass its path")
    path_text = text[5:].removeprefix("//").removeprefix(parts.netloc)
    try:
        return next(
            (path for path in (url2pathname(path_text), path_text) if os.path.isfile(path)), url2pathname(parts.path)
        )
    except ValueError:
        return path_text


def _check_data(url: DataUrl, kind: str, most: int) -> None:
    """Checks the declared type and the size of a `data:` URL before it is decoded; an animation may be an image."""
    declared = url.media_type.partition("/")[0]
    allowed = (kind, "application", "") if kind == "image" else ("image", "video", "application", "")
    if declared not in allowed:
        what = "an image" if kind == "image" else "a video"
        raise MediaError(f"the data: URL does not say that it holds {what}; write data:{kind}/...;base64,...")
    if url.most_bytes > most + 2:
        raise MediaError(f"the data: URL holds more than the limit of {format_bytes(most)}; upload the file instead")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_source(value: object) -> Source:
    """A path, URL, bytes or `Source` as a `Source`; `MediaError` for anything else."""
    if isinstance(value, Source | str | bytes | bytearray) or hasattr(value, "__fspath__"):
        return fetch_source(value)
    raise MediaError(
        f"a medium must be a path, URL, bytes, a PIL image, an array, a tensor or frames, not {type(value).__name__}"
    )
