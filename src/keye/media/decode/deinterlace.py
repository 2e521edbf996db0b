"""Interlaced frames made whole pictures by FFmpeg's bwdif. Standard library and PyAV.

An interlaced frame holds two moments in its odd and even lines; what moved looks combed. The filter keeps the lines of
the first moment and makes up the others from the frames before and after.
"""

from __future__ import annotations

from collections.abc import Iterator

import av.filter
import av.filter.context
from av.video.frame import VideoFrame

#: Smallest side of a picture whose planes the filter takes, also where colour has a quarter of it.
_LEAST_SIDE = 16


def with_neighbours(frames: Iterator[VideoFrame]) -> Iterator[tuple[VideoFrame | None, VideoFrame, VideoFrame | None]]:
    """Each frame with the one before it and, where it is interlaced, the one after it."""
    before, frame = None, next(frames, None)
    while frame is not None:
        after = next(frames, None) if frame.interlaced_frame else None
        yield before, frame, after
        before, frame = frame, after or next(frames, None)


def interpolate_fields(
    before: VideoFrame | None, frame: VideoFrame, after: VideoFrame | None, threads: int
) -> VideoFrame:
    """The frame as it was at its first moment; itself where it is too small."""
    if min(frame.width, frame.height) < _LEAST_SIDE or frame.time_base is None:
        return frame
    graph = av.filter.Graph()
    graph.threads = threads
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )  # fmt: skip
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=all"), graph.add("buffersink")).configure()
    before = before if before is not None and _alike(before, frame) else None
    for frame_in in (before, frame, after if after is not None and _alike(after, frame) else None):
        if frame_in is not None:
            graph.vpush(frame_in)
    graph.vpush(None)
    if before is not None:
        graph.vpull()
    picture = graph.vpull()
    # The filter receives sizes alone.
    picture.colorspace, picture.color_range = frame.colorspace, frame.color_range
    return picture


def _alike(frame_in: VideoFrame, other: VideoFrame) -> bool:
    return (frame_in.width, frame_in.height, frame_in.format.name) == (other.width, other.height, other.format.name)
