"""Every frame of a video in small, beside the frames that were asked for: what finding cuts looks at.

All thumbnails have one size, whatever the shape of the video, and are not turned upright. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from keye.media.decode.wire import FRAME, THUMBNAILS

#: Size of a thumbnail in pixels, and its bytes (RGB).
WIDTH, HEIGHT = 32, 18
BYTES: Final = WIDTH * HEIGHT * 3
#: Thumbnails in a message; the last one of an answer may have fewer.
BATCH: Final = 64

Picture = TypeVar("Picture")


def wanted_times(targets: Sequence[int], times: Iterable[int], scan: Sequence[int] | None) -> Sequence[int]:
    """The times of `targets` and those of a file's `times` that lie in `scan` (first, last), ascending."""
    if not scan:
        return targets
    first, last = scan
    return sorted({*targets, *(time for time in times if first <= time <= last)})


def interleave(
    pictures: Iterable[tuple[int, Picture]],
    targets: Sequence[int],
    scan: Sequence[int] | None,
    resize: Callable[[Picture, int, int], bytes],
    size: tuple[int, int],
) -> Iterator[tuple[bytes, bytes]]:
    """Messages (kind, body) of pictures with their ascending times: one of `size` (width, height) for each target, and
    thumbnails in batches of those in `scan` (first, last)."""
    first, last = scan or (1, 0)
    batch, place = list[bytes](), 0
    for time, picture in pictures:
        if first <= time <= last:
            batch.append(resize(picture, WIDTH, HEIGHT))
        if len(batch) == BATCH:
            yield THUMBNAILS, b"".join(batch)
            batch.clear()
        if place < len(targets) and targets[place] == time:
            body = resize(picture, *size)
            while place < len(targets) and targets[place] == time:
                place += 1
                yield FRAME, body
    if batch:
        yield THUMBNAILS, b"".join(batch)
