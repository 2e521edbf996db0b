"""Small pictures of a video at given times, as JPEG files: for timelines and lists."""

from __future__ import annotations

import io
import math
import threading
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, TypeAlias

from PIL import Image

from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import MediaError
from keye.media.content import identify, probe_cached
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.sampling import SAME_TIME, find_displayed_frames
from keye.media.source.fetch import Source
from keye.media.video import VideoReader
from keye.units import MIB

#: A picture is at most so many times as wide as it may be high.
_WIDEST: Final = 4
_QUALITY: Final = 80
_CACHE_BYTES: Final = 64 * MIB
#: Readers that stay open, and for how many seconds without use.
_IDLE_READERS: Final = 3
#: Videos of which it is known where decoding can begin.
_MOST_STARTS: Final = 16
_IDLE_SECONDS: Final = 45.0

Key: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class Thumbnail:
    """The frame on display at `time` seconds, which came at `timestamp`, as a JPEG file."""

    time: float
    timestamp: float
    width: int
    height: int
    jpeg: bytes = field(repr=False)


class ThumbnailCache:
    """Pictures made before, the last used up to `most_bytes`, and the last readers, which stay open for a while:
    opening a long video takes reading all of it. Safe to share by threads."""

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._entries: OrderedDict[Key, bytes] = OrderedDict()
        self._starts: OrderedDict[Key, Sequence[int]] = OrderedDict()
        self._readers: OrderedDict[Key, tuple[VideoReader, float]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> bytes | None:
        """The picture of a key, None where it is not here."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def keep(self, key: Key, jpeg: bytes) -> None:
        """Takes a picture; the least used make room."""
        with self._lock:
            self._bytes += len(jpeg) - len(self._entries.pop(key, b""))
            self._entries[key] = jpeg
            while self._bytes > self._most:
                self._bytes -= len(self._entries.popitem(last=False)[1])

    def starts(self, key: Key) -> Sequence[int] | None:
        """The frames of a video that cost least, None where they are not known."""
        with self._lock:
            return self._starts.get(key)

    def keep_starts(self, key: Key, starts: Sequence[int]) -> None:
        """Takes the frames of a video that cost least."""
        with self._lock:
            self._starts[key] = starts
            while len(self._starts) > _MOST_STARTS:
                self._starts.popitem(last=False)

    def take_reader(self, key: Key) -> VideoReader | None:
        """A reader that was left open, for the caller alone until `leave_reader`."""
        with self._lock:
            reader, _ = self._readers.pop(key, (None, 0.0))
        return reader

    def leave_reader(self, key: Key, reader: VideoReader) -> None:
        """Keeps a reader open for later."""
        with self._lock:
            before, _ = self._readers.pop(key, (None, 0.0))
            self._readers[key] = reader, time.monotonic()
        if before is not None:
            before.close()
        self.sweep(most=_IDLE_READERS)

    def sweep(self, most: int = 0, seconds: float = _IDLE_SECONDS) -> None:
        """Closes readers that were not used for `seconds`, and the oldest beyond `most` where that is not 0."""
        oldest, closing = time.monotonic() - seconds, list[VideoReader]()
        with self._lock:
            while self._readers:
                key, (reader, used) = next(iter(self._readers.items()))
                if used >= oldest and (not most or len(self._readers) <= most):
                    break
                del self._readers[key]
                closing.append(reader)
        for reader in closing:
            reader.close()

    def close(self) -> None:
        """Closes all readers."""
        self.sweep(seconds=-1.0)


def make_thumbnails(
    source: Source, times: Sequence[float], height: int, *, options: MediaOptions = DEFAULTS, salt: bytes = b"",
    cache: ThumbnailCache | None = None, near: bool = False,
) -> list[Thumbnail]:  # fmt: skip
    """A picture for each of `times`, in their order, at most `height` pixels high, upright and with square pixels.

    Times outside the video get its first or last frame. Frames that are not in `cache` are decoded, each from the key
    before it. With `near` a key stands for times that are nearer to it than half the least distance of two of them,
    which costs far less in videos whose keys lie seconds apart. `salt` separates the caches of owners. Raises
    `MediaError` where the video cannot be read. Blocks.
    """
    own, cache = cache, cache or ThumbnailCache()
    info = probe_cached(source, None, salt, track=options.track)
    size = _fit(info, height)
    about = (salt, identify(source), info.track, options.deinterlaces)
    indices = {at: find_displayed_frames(info.timestamps, [at], tolerance=SAME_TIME)[0] for at in times}
    if near and len(indices) > 1:
        starts = [info.timestamps[number] for number in _starts(source, options.track, cache, about)]
        indices = {at: _nearest(at, number, indices, info, starts) for at, number in indices.items()}
    jpegs = {index: cache.get((*about, size, index)) for index in set(indices.values())}
    try:
        if missing := sorted(index for index, jpeg in jpegs.items() if jpeg is None):
            looks = MediaOptions(deinterlace=options.deinterlace, tone_map=True)
            plan = VideoPlan.of(info, missing, size, tokens_per_frame=0, rate=info.fps, options=looks)
            for index, jpeg in zip(missing, _decode(source, options.track, plan, cache, about), strict=True):
                jpegs[index] = jpeg
                cache.keep((*about, size, index), jpeg)
    finally:
        if own is None:
            cache.close()
    return [Thumbnail(at, info.timestamps[indices[at]], size[1], size[0], jpegs[indices[at]] or b"") for at in times]


def _starts(source: Source, track: int | None, cache: ThumbnailCache, key: Key) -> Sequence[int]:
    """Numbers of the frames that cost least."""
    known = cache.starts(key)
    if known is None:
        reader = cache.take_reader(key) or VideoReader(source, track=track)
        try:
            known = reader.starts()
        except BaseException:
            reader.close()
            raise
        cache.keep_starts(key, known)
        cache.leave_reader(key, reader)
    return known


def _nearest(at: float, number: int, times: Collection[float], info: VideoInfo, starts: Sequence[float]) -> int:
    """The frame that stands for a time: that of a key nearby, or frame `number`."""
    ordered = sorted(times)
    most = min(later - earlier for earlier, later in pairwise(ordered)) / 2
    place = bisect_left(starts, at)
    close = min(starts[max(place - 1, 0) : place + 1], key=lambda start: abs(start - at), default=math.inf)
    return bisect_left(info.timestamps, close) if abs(close - at) <= most else number


def _decode(source: Source, track: int | None, plan: VideoPlan, cache: ThumbnailCache, key: Key) -> list[bytes]:
    """The frames of a plan as JPEG files, by a reader that is open, or a new one where that has used up its time."""
    reader = cache.take_reader(key)
    if reader is not None:
        try:
            return _read(reader, plan, cache, key)
        except MediaError:
            pass
    return _read(VideoReader(source, track=track), plan, cache, key)


def _read(reader: VideoReader, plan: VideoPlan, cache: ThumbnailCache, key: Key) -> list[bytes]:
    jpegs = []
    try:
        for pixels in reader.frames(plan):
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG", quality=_QUALITY)
            jpegs.append(out.getvalue())
    except BaseException:
        reader.close()
        raise
    cache.leave_reader(key, reader)
    return jpegs


def _fit(info: VideoInfo, height: int) -> tuple[int, int]:
    """(height, width) in the shape of the video, not larger than it."""
    scale = min(height / info.height, _WIDEST * height / info.width, 1.0)
    return max(2, round(info.height * scale)), max(2, round(info.width * scale))
