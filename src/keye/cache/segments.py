"""A file that grows by complete segments: what a search index is kept in.

Each segment begins at a multiple of 64 KiB with the prelude of `keye.cache.index_file`, version 3, whose places count
from there, and ends with its JSON header. Segments have a `segment` kind in their header; some hold the cached rows of
several sequences, each beginning with a block of its own, others the header alone.

A segment is appended in three acts: everything behind its prelude is written and brought to disk, then the prelude,
which makes it count. A process that is killed or a disk that fills up leaves the segments before as they were, and
behind them bytes without a prelude, which readers ignore and the next writer overwrites; so are those of a last segment
of which bytes are missing, as in a file that was copied in part. Anything else that does not fit is damage. One process
writes at a time; others may read meanwhile. Knows bytes, not models.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from torch import Tensor

from keye.cache.checksums import FRESH, BlockCheck, damage_error, identity_of
from keye.cache.index_file import (
    ALIGN,
    PRELUDE_BYTES,
    SEGMENTS_VERSION,
    IndexFile,
    Progress,
    decode_header,
    encode_header,
    encode_prelude,
    read_image,
    read_prelude,
    write_rows,
)
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout
from keye.errors import KeyeError
from keye.files import output_file, unwritable
from keye.media.source.fetch import INDEX_MAGIC

#: Most segments of a file.
MOST_SEGMENTS: Final = 1 << 16


@dataclass(frozen=True)
class Segment:
    """A complete segment: bytes `start` to `start + size` of its file, its header, and its rows if it has any."""

    start: int
    size: int
    kind: str
    about: Mapping[str, Any]
    image: IndexFile | None

    @property
    def stop(self) -> int:
        """Where the next one begins."""
        return -(-(self.start + self.size) // ALIGN) * ALIGN


def is_segmented(path: Path) -> bool:
    """Whether a file begins as one of segments does."""
    try:
        with path.open("rb") as file:
            start = file.read(PRELUDE_BYTES)
    except OSError:
        return False
    version = int.from_bytes(start[len(INDEX_MAGIC) : len(INDEX_MAGIC) + 4], "little")
    return start[: len(INDEX_MAGIC)] == INDEX_MAGIC and len(start) == PRELUDE_BYTES and version == SEGMENTS_VERSION


def read_segments(path: Path, start: int = 0) -> list[Segment]:
    """The complete segments of a file from byte `start` on, in order. `KeyeError` for a file that cannot be read, does
    not begin with a segment, or is damaged; what follows the last complete segment is ignored."""
    try:
        with path.open("rb") as file:
            return _read(path, file, start)
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None


def _read(path: Path, file: BinaryIO, start: int) -> list[Segment]:
    end, segments = os.fstat(file.fileno()).st_size, list[Segment]()
    while start + PRELUDE_BYTES <= end or not (start or segments):
        file.seek(start)
        prelude = file.read(PRELUDE_BYTES)
        if start and prelude[: len(INDEX_MAGIC)] != INDEX_MAGIC:
            break
        segment = _read_segment(path, file, start, prelude, end)
        if segment is None:
            break
        segments.append(segment)
        start = segments[-1].stop
        if len(segments) > MOST_SEGMENTS:
            raise damage_error(path, f"it has more than {MOST_SEGMENTS:,} segments")
    if start < end and _has_prelude(file, start, end):
        raise damage_error(path, f"the segment at byte {start:,} has no beginning")
    return segments


def _read_segment(path: Path, file: BinaryIO, start: int, prelude: bytes, end: int) -> Segment | None:
    """The segment at byte `start`; None for one behind the first of which bytes are missing at the end of the file."""
    version, place, length, digest = read_prelude(path, prelude)
    if version != SEGMENTS_VERSION:
        raise KeyeError(f"{path} is an index of one video for keye ask, not one for searching: make one with keye find")
    if place + length > end - start:
        if start:
            return None
        raise damage_error(path, "it is cut short")
    file.seek(start + place)
    about = decode_header(path, file.read(length), digest)
    if not isinstance(about, dict) or not isinstance(kind := about.get("segment"), str):
        raise damage_error(path, f"the header of its segment at byte {start:,} does not say what it is")
    image = read_image(path, file, about, place, place + length, start=start) if "storage" in about else None
    return Segment(start, place + length, kind, about, image)


def _has_prelude(file: BinaryIO, start: int, end: int) -> bool:
    """Whether a segment begins behind `start`, where none is missing."""
    for place in range(start + ALIGN, end - PRELUDE_BYTES, ALIGN):
        file.seek(place)
        if file.read(len(INDEX_MAGIC)) == INDEX_MAGIC:
            return True
    return False


def map_segment(path: Path, segment: Segment) -> tuple[mmap.mmap, BlockCheck]:
    """The bytes of a segment with rows, mapped, and what compares its KV blocks with their checksums."""
    assert segment.image is not None
    try:
        with path.open("rb") as file:
            identity = identity_of(file.fileno(), segment.start)
            if os.fstat(file.fileno()).st_size < segment.start + segment.size:
                raise damage_error(path, "it was cut short since it was opened")
            mapped = mmap.mmap(file.fileno(), segment.size, access=mmap.ACCESS_READ, offset=segment.start)
    except (OSError, ValueError):
        raise KeyeError(f"{path} cannot be mapped into memory: copy it to a local disk") from None
    return mapped, segment.image.checker(mapped, identity)


#: Opens a file for reading and writing; makes it if need be.
OpenFile = Callable[[Path], BinaryIO]


def check_segments(path: Path, progress: Progress | None = None) -> list[Segment]:
    """Compares every KV block of a file with its checksum."""
    segments = read_segments(path)
    for number, segment in enumerate(segments):
        if segment.image is None:
            continue
        mapped, _ = map_segment(path, segment)
        check = segment.image.checker(mapped, FRESH)
        for name in segment.image.layout.rows:
            for layer in range(segment.image.layout.layers):
                check.compare(name, layer)
        if check.damage is not None:
            raise check.damage
        if progress is not None:
            progress(number + 1, len(segments))
    return segments


def open_for_writing(path: Path) -> BinaryIO:
    """An `OpenFile`."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=1 << 20)


def _busy(path: Path) -> KeyeError:
    return KeyeError(f"another process is writing to {path}: wait for it, or name another file")


@contextmanager
def _lock_existing(path: Path) -> Iterator[None]:
    """Keeps the file at `path`, if there is one, locked, so that none that a process writes to is replaced."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _busy(path) from None
    except OSError as error:
        os.close(descriptor)
        raise unwritable(path, error) from None
    try:
        yield
    finally:
        os.close(descriptor)


class SegmentWriter:
    """Appends segments to a file, which is locked while this is open; `segments` are those that it has. `open_file` is
    where a disk that fills up can be injected. `KeyeError` where the file cannot be written, or another process
    writes to it."""

    def __init__(self, path: Path, open_file: OpenFile = open_for_writing) -> None:
        self.path = path
        try:
            self._file = open_file(path)
            #: Holds the lock until the end, also after a failed write, when the file is closed.
            self._descriptor = os.dup(self._file.fileno())
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(self._descriptor).st_size
            self.segments = read_segments(path) if size else []
            os.ftruncate(self._descriptor, min(size, self.stop))
        except BlockingIOError:
            self.close()
            raise _busy(path) from None
        except OSError as error:
            self.close()
            raise unwritable(path, error) from None
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls, path: Path, kind: str, about: Mapping[str, Any], open_file: OpenFile = open_for_writing
    ) -> SegmentWriter:
        """A new file in place of what is at `path`, which has its first segment from the beginning."""
        with _lock_existing(path), ExitStack() as stack:
            with output_file(path) as draft:
                writer = cls(draft, open_file)
                stack.callback(writer.close)
                writer.append(kind, about)
            writer.path = path  # the lock went with the file
            stack.pop_all()
        return writer

    @property
    def stop(self) -> int:
        """Where the next segment begins."""
        return self.segments[-1].stop if self.segments else 0

    def append(
        self, kind: str, about: Mapping[str, Any], caches: Sequence[KVCache] = (), layout: KVLayout | None = None,
        tokens: Tensor | None = None,
    ) -> Segment:  # fmt: skip
        """Writes a segment, with the rows of sequences in `layout` and their `tokens` int64 [4, 64 x blocks] if it has
        any. It counts when this returns; `KeyeError` where the disk is full, and the file is as before."""
        start = self.stop
        try:
            self._file.seek(start)
            self._file.write(bytes(PRELUDE_BYTES))
            header: dict[str, Any] = {"segment": kind, **about}
            if layout is not None and tokens is not None:
                header["storage"] = write_rows(self._file, caches, layout, tokens, start)
            place, text = self._file.tell() - start, encode_header(header)
            self._file.write(text)
            self._sync()
            self._file.seek(start)
            self._file.write(encode_prelude(SEGMENTS_VERSION, place, text))
            self._sync()
        except BaseException as error:
            with suppress(OSError):  # what is still in its buffer cannot be written
                self._file.close()
            os.ftruncate(self._descriptor, start)
            if isinstance(error, OSError):
                raise unwritable(self.path, error) from None
            raise
        segment = self._read_back(start)
        self.segments.append(segment)
        return segment

    def close(self) -> None:
        """Unlocks the file. May be called more than once."""
        with suppress(OSError):
            self._file.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read_back(self, start: int) -> Segment:
        """The segment that was written at byte `start`; `KeyeError` where another file took the place of this one."""
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                raise _busy(self.path)
            (segment,) = _read(self.path, self._file, start)
        except OSError as error:
            raise unwritable(self.path, error) from None
        return segment

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
