"""An open video file inside the decode worker: its tracks, its packets from the first again and again, its decoder.

Tracks are counted from 1, in the file's order, without pictures that are attached, such as covers, or stand beside an
animation. Standard library and PyAV.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keye.media.container.completeness import ends_early
from keye.media.container.packets import Scan, packet_key, scan
from keye.media.container.timeline import JOIN
from keye.media.decode.wire import WorkerError, send_error

#: What untrusted files may be: containers and codecs that people use, of the hundreds that FFmpeg knows. The rest is
#: seldom used and seldom tested.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,ivf,yuv4mpegpipe,mxf,mjpeg"
_CODECS = frozenset(
    "h264 hevc av1 libdav1d vp8 vp9 libvpx libvpx-vp9 mpeg4 mpeg2video mpeg1video mjpeg gif h263 flv prores wmv1 wmv2 "
    "wmv3 vc1 msmpeg4v2 msmpeg4 theora dvvideo vvc rawvideo png ffv1".split()
)
#: What FFmpeg would make videos of by their content alone although they are pictures, text or lists of other files.
_NO_VIDEOS = re.compile(
    r"\w+_pipe|image2|image2pipe|tty|bin|xbin|adf|idf|iff|alias_pix|brender_pix|ico|fits|txd|concatf?|hls|dash|sdp|"
    r"lavfi|jpegxl_anim"
)
#: Parts of PyAV that it imports only when a file needs them, which is too late for a confined process. Which of them
#: exist depends on its version.
LAZY = tuple(f"av.{kind}.{part}" for kind in ("audio", "subtitles", "data", "attachments", "video")
             for part in ("stream", "codeccontext"))  # fmt: skip
_JPEG = b"\xff\xd8\xff"
#: FFmpeg's flag (AVFMT_FLAG_GENPTS) of readers that guess times of showing.
_GUESS_PTS = 1
#: What a file calls its default track counts as many pixels, and having packets as many: ffmpeg's own weights.
_DEFAULT_PIXELS, _PACKET_PIXELS = 5_000_000, 100_000_000
#: Tracks that go with another one and are not shown by themselves.
_ASIDE = Disposition.timed_thumbnails | Disposition.dependent
#: Tracks that a sentence lists.
_LISTED = 12


@dataclass(frozen=True)
class Opening:
    """How a file is opened: decoder `threads`, the most pixels of a frame, with `common_only` common containers and
    codecs alone, and the number of the video `track`."""

    threads: int
    pixel_limit: int
    common_only: bool
    track: int | None = None


class VideoFile:
    """A file with one of its video tracks. `faults` counts the packets with which the decoder has found fault;
    `ends_early` tells whether bytes are missing at the end, as far as the file tells.

    Raises `WorkerError` where the file is not a video or beyond the limits.
    """

    def __init__(self, file: BinaryIO, opening: Opening) -> None:
        self.file = file
        self.opening = opening
        self.faults = 0
        self.ends_early = ends_early(file)
        self.container, self.stream = self._open()
        self.scan: Scan = scan(self.container, self.stream)

    def packets(self) -> Iterator[tuple[int, av.Packet[VideoStream]]]:
        """The packets of the track with their places from 0 on, from the first; at the end an empty one, which has the
        decoder give the frames that it holds back. The decoder begins afresh."""
        place = -1
        for packet in self._from_start():
            place += packet.size > 0
            yield place, packet

    def decode(self, packet: av.Packet[VideoStream] | None) -> list[VideoFrame]:
        """The frames that the decoder gives upon a packet; none where it finds fault with it."""
        try:
            return self.stream.decode(packet)
        except av.error.FFmpegError:
            self.faults += 1
            return []

    def sample(self, ranges: Sequence[tuple[int, int]]) -> Iterator[VideoFrame]:
        """The frames of the packets from `first` to before `end` of each range, ascending; ranges that touch are
        decoded together, others by themselves. A frame's `opaque` is the place of its packet."""
        left = deque(ranges)
        inside = False
        for place, packet in self.packets():
            while left and place >= left[0][1]:
                left.popleft()
            needed = packet.size > 0 and bool(left) and left[0][0] <= place
            if inside and not needed:
                yield from self.decode(None)
                self.stream.codec_context.flush_buffers()
            inside = needed
            if needed:
                packet.opaque = place
                yield from self.decode(packet)
            elif not left:
                return

    @property
    def has_joins(self) -> bool:
        """Whether parts of the file were found whose clocks do not go on, so that times were changed."""
        return bool(self.scan.packets.places(JOIN))

    def _from_start(self) -> Iterator[av.Packet[VideoStream]]:
        try:
            self.container.seek(self.scan.first_packet[1] or 0, stream=self.stream)
            self.stream.codec_context.flush_buffers()
        except av.error.FFmpegError:
            self.reopen()
        first = True
        for packet in self.container.demux(self.stream):
            if first and packet_key(packet) != self.scan.first_packet:
                self.reopen()
                yield from self.container.demux(self.stream)
                return
            first = False
            yield packet

    def reopen(self) -> None:
        """For containers that cannot seek back to their first packet."""
        self.container.close()
        self.file.seek(0)
        self.container, self.stream = self._open()

    def _open(self) -> tuple[InputContainer, VideoStream]:
        opening = self.opening
        container = open_container(self.file, common_only=opening.common_only)
        # Packets keep the times that the container tells: FFmpeg's guesses are wrong where frames are reordered.
        container.flags &= ~_GUESS_PTS
        stream = choose_track(video_tracks(container), opening.track)
        context = stream.codec_context
        if context is None:
            raise WorkerError("is in a video codec that is not supported; re-encode it, for example as H.264")
        name = context.codec.name
        if opening.common_only and name not in _CODECS:
            raise WorkerError(f"is in the video codec {name}, which is not read here; re-encode it as H.264")
        if context.width * context.height > opening.pixel_limit:
            raise WorkerError(
                f"has frames of {context.width}x{context.height} pixels, more than the limit of "
                f"{opening.pixel_limit:,} pixels; re-encode it smaller"
            )
        stream.thread_type = "AUTO"
        context.thread_count = opening.threads
        context.copy_opaque = True  # frames tell which packet they are of
        return container, stream


@contextmanager
def send_failures(out: BinaryIO, needs: str) -> Iterator[None]:
    """Sends what a file makes impossible within the block as an error; `needs` is said where memory did not suffice."""
    try:
        yield
    except WorkerError as error:
        send_error(out, *error.args)
    except MemoryError:
        send_error(out, needs)
    except av.error.FFmpegError as error:
        send_error(out, f"is damaged ({error.strerror}); download it again or re-encode it")


def open_container(file: BinaryIO, *, common_only: bool) -> InputContainer:
    """The container of a video file, which opens nothing else. Raises `WorkerError` for a file that is none."""
    start = file.read(len(_JPEG))
    file.seek(0)
    try:
        container = av.open(
            file,
            mode="r",
            # Pictures that follow one another in a file; FFmpeg takes it for a row of files.
            format="mjpeg" if start == _JPEG else None,
            metadata_errors="replace",  # Titles and the like may be in any encoding; none of them is used.
            container_options={"protocol_whitelist": "none"} | ({"format_whitelist": _FORMATS} if common_only else {}),
            io_open=_reject_open,
            buffer_size=1 << 18,
        )
    except av.error.FFmpegError:
        raise WorkerError(
            "is not a video that can be read (unknown format, or damaged or cut short at its index); "
            "check the file or download it again"
        ) from None
    if _NO_VIDEOS.fullmatch(container.format.name):
        raise WorkerError("is not a video that can be read; give a video or an image")
    return container


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


def _reject_open(url: str, flags: int, options: Any) -> None:
    raise PermissionError("a media file may not open other files")
