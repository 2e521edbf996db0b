"""Small pictures of a video at given times, as JPEG files: for timelines and lists."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from PIL import Image

from keye.config.media import DEFAULTS, MediaOptions
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


@dataclass(frozen=True)
class Thumbnail:
    """The frame on display at `time` seconds, which came at `timestamp`, as a JPEG file."""

    time: float
    timestamp: float
    width: int
    height: int
    jpeg: bytes = field(repr=False)


class ThumbnailCache:
    """Pictures made before, the last used up to `most_bytes`. Safe to share by threads."""

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._entries: OrderedDict[tuple[object, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> bytes | None:
        """The picture of a key, None where it is not here."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def keep(self, key: tuple[object, ...], jpeg: bytes) -> None:
        """Takes a picture; the least used make room."""
        with self._lock:
            self._bytes += len(jpeg) - len(self._entries.pop(key, b""))
            self._entries[key] = jpeg
            while self._bytes > self._most:
                self._bytes -= len(self._entries.popitem(last=False)[1])


def make_thumbnails(
    source: Source, times: Sequence[float], height: int, *, options: MediaOptions = DEFAULTS, salt: bytes = b"",
    cache: ThumbnailCache | None = None,
) -> list[Thumbnail]:  # fmt: skip
    """A picture for each of `times`, in their order, at most `height` pixels high, upright and with square pixels.

    Times outside the video get its first or last frame. Frames that are not in `cache` are decoded, each from the key
    before it. `salt` separates the caches of owners. Raises `MediaError` where the video cannot be read. Blocks.
    """
    cache = cache or ThumbnailCache()
    info = probe_cached(source, None, salt, track=options.track)
    size = _fit(info, height)
    indices = {time: find_displayed_frames(info.timestamps, [time], tolerance=SAME_TIME)[0] for time in times}
    about = (salt, identify(source), info.track, options.deinterlaces, size)
    jpegs = {index: cache.get((*about, index)) for index in set(indices.values())}
    if missing := sorted(index for index, jpeg in jpegs.items() if jpeg is None):
        looks = MediaOptions(deinterlace=options.deinterlace, tone_map=True)
        with VideoReader(source, track=options.track) as reader:
            plan = VideoPlan.of(reader.info, missing, size, tokens_per_frame=0, rate=info.fps, options=looks)
            for index, pixels in zip(missing, reader.frames(plan), strict=True):
                out = io.BytesIO()
                Image.fromarray(pixels).save(out, "JPEG", quality=_QUALITY)
                jpegs[index] = out.getvalue()
                cache.keep((*about, index), out.getvalue())
    return [
        Thumbnail(time, info.timestamps[indices[time]], size[1], size[0], jpegs[indices[time]] or b"") for time in times
    ]


def _fit(info: VideoInfo, height: int) -> tuple[int, int]:
    """(height, width) in the shape of the video, not larger than it."""
    scale = min(height / info.height, _WIDEST * height / info.width, 1.0)
    return max(2, round(info.height * scale)), max(2, round(info.width * scale))
