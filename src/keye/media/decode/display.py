"""How decoded pictures are to be shown: their orientation, the shape of their pixels, their light, their fields.

These facts are stored beside the pixels, by containers and by codecs; players and ffmpeg apply them, decoders do not.
An interlaced frame holds two moments in its odd and even lines; what moved looks combed. FFmpeg's bwdif keeps the lines
of the first moment and makes up the others from the frames before and after. Standard library and PyAV.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av.filter
import av.filter.context
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame

#: Pixels up to this many times as wide as high, or as high as wide, are believed. Real ones lie between 1:2 and 2:1.
MAX_ASPECT = 10
#: How far pixels may be from square ones, where no one sees it: odd sizes are often stored with such a shape.
_NEARLY_SQUARE = Fraction(1, 100)
#: Degrees that a display matrix may be off a quarter turn, as rounding leaves them.
_EXACT_DEGREES = 1.0
#: Names of transfer characteristics (ITU-T H.273) of high dynamic range, by their number.
_HIGH_RANGE = {16: "pq", 18: "hlg"}
#: Smallest side of a picture whose planes the filter takes, also where colour has a quarter of it.
_LEAST_SIDE = 16


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright: turned by `rotation` degrees counter-clockwise, a multiple of 90, then
    mirrored left to right if `mirrored`. `exact` is false where a display matrix asks for an angle in between."""

    rotation: int = 0
    mirrored: bool = False
    exact: bool = True


def orientation(matrix: Sequence[int]) -> Orientation:
    """The nearest orientation to a display matrix, nine numbers as in FFmpeg's `libavutil/display.h`: a stored point
    (x, y) is shown at (a x + c y, b x + d y), with a, b = `matrix[0:2]` and c, d = `matrix[3:5]`."""
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    if a * d == b * c:
        return Orientation()  # shows a line: no matrix that anyone means
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    (across, down), rest = ((c, b), (a, d)) if swapped else ((a, d), (b, c))
    exact = math.degrees(math.atan2(math.hypot(*rest), math.hypot(across, down))) <= _EXACT_DEGREES
    if swapped:
        return Orientation(90 if down < 0 else 270, (across < 0) == (down < 0), exact)
    return Orientation(180 if down < 0 else 0, (across < 0) != (down < 0), exact)


def frame_orientation(frame: VideoFrame) -> Orientation:
    """The orientation of a decoded frame: the container's, else the codec's own."""
    try:
        side_data: Any = frame.side_data  # in the order in which FFmpeg prefers them
        matrix = next((bytes(data) for data in side_data if data.type == Type.DISPLAYMATRIX), None)
        return Orientation() if matrix is None else orientation(struct.unpack("=9i", matrix))
    except ValueError:  # beside a kind of side data that PyAV does not know none can be read
        turns = round(frame.rotation / 90)
        return Orientation(turns * 90 % 360, exact=abs(frame.rotation - turns * 90) <= _EXACT_DEGREES)


def check_aspect(aspect: Fraction | None) -> Fraction | None:
    """Width of a pixel for its height: 1 where nothing else is stored, None where what is stored cannot be."""
    if not aspect or abs(aspect - 1) < _NEARLY_SQUARE:
        return Fraction(1)
    return aspect if Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT else None


def display_size(width: int, height: int, aspect: Fraction, pixel_limit: int) -> tuple[int, int]:
    """(width, height) of a stored picture with square pixels: the width is stretched, as players do it, or, where that
    makes more than `pixel_limit` pixels, the height is shrunk."""
    wide = max(1, round(width * aspect))
    if aspect > 1 and wide * height > pixel_limit:
        return width, max(1, round(height / aspect))
    return wide, height


def display_facts(frame: VideoFrame, aspect: Fraction | None, pixel_limit: int) -> dict[str, Any]:
    """What `keye.media.video.VideoInfo` says about pictures, from the first one and the sample aspect ratio of its
    stream. `shown` is the size with square pixels before the turn."""
    turn, believed = frame_orientation(frame), check_aspect(aspect)
    return {
        "width": frame.width,
        "height": frame.height,
        "shown": display_size(frame.width, frame.height, believed or Fraction(1), pixel_limit),
        "aspect": None if aspect is None else [aspect.numerator, aspect.denominator],
        "aspect_believed": believed is not None,
        "rotation": turn.rotation,
        "mirrored": turn.mirrored,
        "exact_orientation": turn.exact,
        "interlaced": bool(frame.interlaced_frame),
        "transfer": _HIGH_RANGE.get(frame.color_trc, "sdr"),
    }


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
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=all"), graph.add("buffersink")).configure()
    layout = frame.width, frame.height, frame.format.name
    near = [f if f is not None and (f.width, f.height, f.format.name) == layout else None for f in (before, after)]
    for frame_in in (near[0], frame, near[1]):
        if frame_in is not None:
            graph.vpush(frame_in)
    graph.vpush(None)
    if near[0] is not None:
        graph.vpull()
    picture = graph.vpull()
    picture.colorspace, picture.color_range = frame.colorspace, frame.color_range  # the filter receives sizes alone
    return picture
