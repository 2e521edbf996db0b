"""Which video track of a file is read. Standard library and PyAV.

Tracks are counted from 1, in the file's order, without pictures that are attached, such as covers, or stand beside an
animation.
"""

from __future__ import annotations

from collections.abc import Sequence

from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from keye.media.decode.wire import WorkerError

#: What a file calls its default track counts as many pixels, and having packets as many: ffmpeg's own weights.
_DEFAULT_PIXELS, _PACKET_PIXELS = 5_000_000, 100_000_000
#: Tracks that go with another one and are not shown by themselves.
_ASIDE = Disposition.timed_thumbnails | Disposition.dependent
#: Tracks that a sentence lists.
_LISTED = 12


def video_tracks(container: InputContainer) -> list[VideoStream]:
    """The tracks that can be chosen. Raises `WorkerError` where there is none."""
    tracks = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not tracks:
        raise WorkerError("has no video stream (it may be audio only); give a file with pictures")
    # The still pictures of a HEIF or AVIF file, which has none of them in a track, have no times.
    return [track for track in tracks if track.frames != 1 or track.time_base != 1] or tracks


def choose_track(tracks: Sequence[VideoStream], number: int | None) -> VideoStream:
    """Track `number`, or the one that ffmpeg and players choose: the file's default, then the largest."""
    if number is None:
        return max(tracks, key=_score)
    if not 1 <= number <= len(tracks):
        raise WorkerError(f"has no video track {number:,}; give {{}} one of {'; '.join(list_tracks(tracks))}", "track")
    return tracks[number - 1]


def list_tracks(tracks: Sequence[VideoStream]) -> list[str]:
    """The tracks in words, one each, such as "2: 1920x1080 h264, default"."""
    words = []
    for number, track in enumerate(tracks[:_LISTED], 1):
        marks = [name for name in ("default", "timed_thumbnails", "dependent") if track.disposition & Disposition[name]]
        context = track.codec_context
        picture = "unknown" if context is None else f"{context.width}x{context.height} {context.name}"
        words.append(", ".join([f"{number}: {picture}", *marks]).replace("_", " "))
    return words + ([f"... {len(tracks)} in all"] if len(tracks) > _LISTED else [])


def _score(track: VideoStream) -> tuple[bool, bool, int]:
    """Orders tracks; the first of the highest is chosen. One that cannot be decoded or goes with another is last."""
    context = track.codec_context
    pixels = 0 if context is None else context.width * context.height
    filled = track.start_time is not None or track.frames > 0
    return (
        context is not None,
        not track.disposition & _ASIDE,
        pixels + _PACKET_PIXELS * filled + _DEFAULT_PIXELS * bool(track.disposition & Disposition.default),
    )
