"""The bytes of a data file, plain or compressed by gzip: read from front to back once, then at any place.

A compressed file gets places every few MiB from which decompression can go on, so that a row costs one block.
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from keye.errors import KeyeError
from keye.units import MIB, format_bytes

#: Bytes that are read at once.
PIECE: Final = 4 * MIB
#: Longest row, in bytes.
MAX_ROW: Final = 64 * MIB
#: Most that a compressed file may hold.
MAX_UNPACKED: Final = 1 << 40
_GZIP: Final = b"\x1f\x8b"
_INPUT: Final = 1 << 18
#: Places from which decompression can go on, each with a state of about 45 KiB.
_MOST_POINTS: Final = 2048
#: Blocks that stay decompressed.
CACHED_BLOCKS: Final = 4
_MOST_OPEN: Final = 64


class Raw(Protocol):
    """Bytes of one file. `size` and `digest`, which tells changed bytes, are known after a first pass of `pieces`."""

    path: Path

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def edges(self) -> tuple[int, ...]:
        """Where blocks begin that are read as one; empty where any place is as good."""
        ...

    def head(self, count: int) -> bytes: ...

    def pieces(self) -> Iterator[bytes]: ...

    def read(self, start: int, stop: int) -> bytes: ...


def open_raw(path: Path) -> Raw:
    """The bytes of a file, decompressed if its first bytes say that it is gzip. `KeyeError` where it cannot be read."""
    file = PlainFile(path)
    return GzipFile(file) if file.head(2) == _GZIP else file


class _Descriptors:
    """Open files, the last used: sets may have more shards than a process may have files."""

    def __init__(self) -> None:
        self._open = OrderedDict[Path, int]()
        self._lock = threading.Lock()

    def read(self, path: Path, count: int, place: int) -> bytes:
        """At most `count` bytes at a place of the file."""
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
            else:
                self._open[path] = _open(path)
                while len(self._open) > _MOST_OPEN:
                    os.close(self._open.popitem(last=False)[1])
            return os.pread(self._open[path], count, place)


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}); check the path of the data") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise KeyeError(f"{path} is not a regular file; give a file of rows or a folder of such files")
    return descriptor


_DESCRIPTORS: Final = _Descriptors()


class PlainFile:
    """A file as it is. Threads may read at once."""

    edges: tuple[int, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path, self.digest = path, ""
        self.read(0, 1)
        self.size = path.stat().st_size

    def head(self, count: int) -> bytes:
        return self.read(0, count)

    def pieces(self) -> Iterator[bytes]:
        place, check = 0, 0
        while piece := _DESCRIPTORS.read(self.path, PIECE, place):
            check = zlib.crc32(piece, check)
            place += len(piece)
            yield piece
        self.size, self.digest = place, f"{place}-{check:08x}"

    def read(self, start: int, stop: int) -> bytes:
        parts = []
        try:
            while start < stop and (piece := _DESCRIPTORS.read(self.path, stop - start, start)):
                parts.append(piece)
                start += len(piece)
        except OSError as error:
            raise KeyeError(f"{self.path} cannot be read ({error.strerror}); check the disk") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)


class GzipFile:
    """A file compressed by gzip, of one or several members."""

    def __init__(self, file: PlainFile) -> None:
        self.path, self._file = file.path, file
        self.size, self.digest = 0, ""
        #: Place in the bytes, place in the file, and the decompressor there.
        self._points: list[tuple[int, int, zlib._Decompress]] = [(0, 0, zlib.decompressobj(31))]
        self._spacing = PIECE
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    @property
    def edges(self) -> tuple[int, ...]:
        return tuple(point[0] for point in self._points)

    def head(self, count: int) -> bytes:
        try:
            return zlib.decompressobj(31).decompress(self._file.head(_INPUT), count)
        except zlib.error as error:
            raise self._broken(error) from None

    def pieces(self) -> Iterator[bytes]:
        check = size = 0
        for piece in self._unpack(self._points[0], remember=True):
            check = zlib.crc32(piece, check)
            size += len(piece)
            if size > MAX_UNPACKED:
                raise KeyeError(f"{self.path} unpacks to more than {format_bytes(MAX_UNPACKED)}; split it")
            yield piece
        self.size, self.digest = size, f"{size}-{check:08x}"

    def read(self, start: int, stop: int) -> bytes:
        first = bisect_right(self._points, start, key=lambda point: point[0]) - 1
        parts = []
        while start < stop and first < len(self._points):
            begin, block = self._points[first][0], self._block(first)
            parts.append(block[start - begin : stop - begin])
            start, first = begin + len(block), first + 1
        return b"".join(parts)

    def _block(self, index: int) -> bytes:
        """The bytes from one point to the next."""
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        begin = self._points[index][0]
        end = self._points[index + 1][0] if index + 1 < len(self._points) else self.size
        parts, missing = [], end - begin
        for piece in self._unpack(self._points[index], remember=False):
            parts.append(piece[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        self._blocks[index] = b"".join(parts)
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[index]

    def _unpack(self, point: tuple[int, int, zlib._Decompress], *, remember: bool) -> Iterator[bytes]:
        """Pieces of the bytes from a point on. The first pass remembers points."""
        out, place, state = point[0], point[1], point[2].copy()
        last, is_inside = out, place > 0
        try:
            while packed := self._file.read(place, place + _INPUT):
                place += len(packed)
                while packed:
                    piece, is_inside = state.decompress(packed, PIECE), True
                    packed = state.unconsumed_tail
                    if state.eof:  # another member may follow, or zeros up to the end of a block
                        packed, state, is_inside = state.unused_data.lstrip(b"\0"), zlib.decompressobj(31), False
                    out += len(piece)
                    if piece:
                        yield piece
                if remember and out - last >= self._spacing:
                    self._remember(out, place, state)
                    last = out
        except zlib.error as error:
            raise self._broken(error) from None
        if remember and is_inside:
            raise KeyeError(f"{self.path} ends in the middle of its gzip data; download it again")

    def _remember(self, out: int, place: int, state: zlib._Decompress) -> None:
        self._points.append((out, place, state.copy()))
        if len(self._points) > _MOST_POINTS:
            self._points = self._points[::2]
            self._spacing *= 2

    def _broken(self, error: zlib.error) -> KeyeError:
        return KeyeError(f"{self.path} is not valid gzip ({error}); download it again")
