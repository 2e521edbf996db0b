"""The process that touches video files: demuxes, decodes and shrinks frames under limits. Standard library and PyAV.

Started by `keye.media.video` with an open file; it opens nothing else, so a playlist inside the file leads nowhere.
It imports neither numpy nor torch. Conversation: on start it sends one INFO message; then, for each request line
(JSON) on standard input, one FRAME message per target in ascending order and an END message. An ERROR message ends it.
`keye.media.wire` has the form of messages, `keye.media.sandbox` what the process may not do.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from keye.media.deinterlace import deinterlaced, with_neighbours
from keye.media.display import display_facts
from keye.media.sandbox import confine
from keye.media.tracks import choose_track, described, video_tracks
from keye.media.wire import END, FRAME, INFO, WorkerError, report_crashes, send, send_error

if TYPE_CHECKING:
    from keye.media.animation_reader import AnimationReader

#: Codecs in which frames that the decoder calls non-reference are needed by no other frame, so that leaving them out
#: changes no pixel. HEVC is not one: its sub-layer non-reference frames may serve higher layers.
_SKIPPABLE = frozenset({"h264", "mpeg2video"})
#: What strangers' files may be: containers and codecs that people use, of the hundreds that FFmpeg knows. The rest is
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
_JPEG = b"\xff\xd8\xff"
#: Parts of PyAV that it imports only when a file needs them, which is too late for a confined process. Which of them
#: exist depends on its version.
_LAZY = tuple(f"av.{kind}.{part}" for kind in ("audio", "subtitles", "data", "attachments", "video")
              for part in ("stream", "codeccontext"))  # fmt: skip
#: What reads animations of image formats.
_ANIMATIONS = "keye.media.animation_reader"
#: How far, in frame intervals, a decoded frame may lie behind the time it was asked for.
_LATE_FRAMES = 2.5


@dataclass
class Scan:
    """What demuxing alone tells. Times are in units of the stream's time base.

    `times` are the frames' presentation times in ascending order; `known` is false when the container gives none and
    they are counted. `keys` are the times of frames where decoding can start. `last_duration` is how long the container
    shows the last frame, None where it does not tell.
    """

    times: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    known: bool = True
    first_packet: tuple[int | None, int | None] = (None, None)
    last_duration: int | None = None
    ends: dict[int, float] = field(default_factory=dict)
    first_frame: VideoFrame | None = None


class Reader:
    """One video file, opened, with its scan; with `common_only` of the common containers and codecs alone. `track` is
    the number of the video track (`tracks`)."""

    def __init__(
        self,
        file: BinaryIO,
        threads: int,
        pixel_limit: int,
        frame_limit: int,
        common_only: bool,
        track: int | None = None,
    ) -> None:
        self.file = file
        self.threads = threads
        self.pixel_limit = pixel_limit
        self.common_only = common_only
        self.track = track
        self.deinterlace = False
        self.container, self.stream = self._open()
        self.scan = scan(self.container, self.stream)
        if not self.scan.times or self.scan.first_frame is None:
            raise WorkerError("holds no frame that can be decoded; re-encode it")
        if len(self.scan.times) > frame_limit:
            raise WorkerError(
                f"has {len(self.scan.times):,} frames, more than the limit of {frame_limit:,}; cut it into parts"
            )

    @property
    def times(self) -> list[int]:
        """The frames' presentation times."""
        return self.scan.times

    def info(self) -> dict[str, Any]:
        """Facts for `keye.media.video.VideoInfo`; seconds count from the container's own zero."""
        frame, stream = self.scan.first_frame, self.stream
        assert frame is not None and stream.time_base is not None
        rate = stream.average_rate or stream.guessed_rate
        duration, start = self.container.duration, self.container.start_time
        first = float(self.scan.times[0] * stream.time_base)
        tracks = video_tracks(self.container)
        return {
            **display_facts(frame, stream.sample_aspect_ratio, self.pixel_limit),
            "format": self.container.format.name,
            "codec": stream.codec_context.name,
            "track": tracks.index(stream) + 1,
            "tracks": described(tracks),
            "track_asked": self.track is not None,
            "rate": [rate.numerator, rate.denominator] if rate else None,
            "time_base": [stream.time_base.numerator, stream.time_base.denominator],
            # Where sound begins first, the clock of players runs before the first picture is shown.
            "container_start": first if start is None else min(start / av.time_base, first),
            "declared_end": None if duration is None else (duration + (start or 0)) / av.time_base,
            "declared_frames": stream.frames or None,
            "readable_end": max(self.scan.ends.values()),
            "known_times": self.scan.known,
            "last_duration": self.scan.last_duration,
        }

    def frames(self, targets: list[int], width: int, height: int, deinterlace: bool) -> Iterator[bytes]:
        """RGB bytes (height x width x 3) of the frame shown at each target time, ascending, before it is turned and
        mirrored; with `deinterlace` of interlaced frames their first moment."""
        self.deinterlace = deinterlace
        resize = VideoReformatter()
        for frame in self._decoded(targets):
            yield packed_rgb(resize, frame, width, height, self.threads)

    def _decoded(self, targets: list[int]) -> Iterator[VideoFrame]:
        """The frame for each target: first without the frames nobody needs, then, if any is missing, with them."""
        place = 0
        assert self.scan.first_frame is not None
        interlaced = self.deinterlace and self.scan.first_frame.interlaced_frame
        if self.scan.known and self.stream.codec_context.name in _SKIPPABLE and not interlaced:
            for frame in self._pass(targets, lean=True):
                if frame is None:
                    break
                place += 1
                yield frame
        if place < len(targets):
            for frame in self._pass(targets[place:], lean=False):
                if frame is None:
                    raise WorkerError(
                        f"is cut short or damaged: no frame at {self._seconds(targets[place]):.1f} s can be decoded; "
                        "download it again or pass a smaller {}",
                        "video_end",
                    )
                place += 1
                yield frame

    def _pass(self, targets: list[int], *, lean: bool) -> Iterator[VideoFrame | None]:
        """One run through the file; None ends it early when a target has no frame."""
        self._rewind()
        wanted = Wanted(targets, self._late_limit(), exact=lean)
        counted = iter(self.scan.times)
        for before, frame, after in with_neighbours(self._decode(wanted, lean=lean)):
            if self.scan.known:
                if frame.pts is None:
                    continue
                time = frame.pts
            else:
                time = next(counted, self.scan.times[-1])
            for hit in wanted.take(time, frame):
                if hit is not None and hit.is_corrupt:
                    raise self._damaged(time)
                if hit is None or not (self.deinterlace and hit.interlaced_frame):
                    yield hit
                else:  # takes its neighbours, which a lean pass may have left out
                    yield None if lean else deinterlaced(before, hit, after, self.threads)
                if hit is None or (lean and self.deinterlace and hit.interlaced_frame):
                    return
            if wanted.done:
                return
        if not wanted.done:
            yield None

    def _decode(self, wanted: Wanted, *, lean: bool) -> Iterator[VideoFrame]:
        """Decoded frames of the groups of pictures that hold a wanted frame; of the others packets are only read."""
        context, keys = self.stream.codec_context, self.scan.keys
        skipping, group = False, keys[0] if keys else 0
        for packet in self._packets():
            if packet.size and packet.is_keyframe and self.scan.known and packet.pts is not None:
                group = packet.pts
            if packet.size and self.scan.known and keys:
                goal = keys[max(bisect_right(keys, wanted.pending) - 1, 0)]
                if goal > group:
                    skipping = True
                    continue
                if skipping and not packet.is_keyframe:
                    continue
                if skipping:
                    context.flush_buffers()
                    skipping = False
            if lean:
                context.skip_frame = "DEFAULT" if packet.pts in wanted.times else "NONREF"
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                # A packet that the container itself calls broken (the last one of a cut file) was never promised.
                if not packet.is_corrupt:
                    raise self._damaged(wanted.pending) from None

    def _packets(self) -> Iterator[av.Packet[VideoStream]]:
        """Packets of the video stream from its start, then the empty packet that flushes the decoder."""
        first = True
        for packet in self.container.demux(self.stream):
            if first and (packet.pts, packet.dts) != self.scan.first_packet:
                self._reopen()
                yield from self.container.demux(self.stream)
                return
            first = False
            yield packet

    def _rewind(self) -> None:
        try:
            start = self.scan.first_packet[1]
            self.container.seek(self.scan.times[0] if start is None else start, stream=self.stream)
            self.stream.codec_context.flush_buffers()
        except av.error.FFmpegError:
            self._reopen()

    def _reopen(self) -> None:
        """For containers that cannot seek back to their first packet."""
        self.container.close()
        self.file.seek(0)
        self.container, self.stream = self._open()

    def _open(self) -> tuple[InputContainer, VideoStream]:
        start = self.file.read(len(_JPEG))
        self.file.seek(0)
        try:
            container = av.open(
                self.file,
                mode="r",
                # Pictures that follow one another in a file; FFmpeg takes it for a row of files.
                format="mjpeg" if start == _JPEG else None,
                metadata_errors="replace",  # Titles and the like may be in any encoding; none of them is used.
                container_options={"protocol_whitelist": "none"}
                | ({"format_whitelist": _FORMATS} if self.common_only else {}),
                io_open=_refuse,
                buffer_size=1 << 18,
            )
        except av.error.FFmpegError:
            raise WorkerError(
                "is no video that can be read (unknown format, or damaged or cut short at its index); "
                "check the file or download it again"
            ) from None
        if _NO_VIDEOS.fullmatch(container.format.name):
            raise WorkerError("is no video that can be read; give a video or an image")
        stream = choose_track(video_tracks(container), self.track)
        context = stream.codec_context
        if context is None:
            raise WorkerError("is in a video codec that is not supported; re-encode it, for example as H.264")
        if self.common_only and context.codec.name not in _CODECS:
            raise WorkerError(
                f"is in the video codec {context.codec.name}, which is not read here; re-encode it as H.264"
            )
        if context.width * context.height > self.pixel_limit:
            raise WorkerError(
                f"has frames of {context.width}x{context.height} pixels, more than the limit of "
                f"{self.pixel_limit:,} pixels; re-encode it smaller"
            )
        stream.thread_type = "AUTO"
        context.thread_count = self.threads
        return container, stream

    def _late_limit(self) -> float:
        times = self.scan.times
        return _LATE_FRAMES * max((times[-1] - times[0]) / max(len(times) - 1, 1), 1)

    def _seconds(self, time: int) -> float:
        assert self.stream.time_base is not None
        return float((time - self.scan.times[0]) * self.stream.time_base)

    def _damaged(self, time: int) -> WorkerError:
        return WorkerError(
            f"is damaged near {self._seconds(time):.1f} s; download it again, re-encode it, or leave that part out "
            "with {} and {}",
            "video_start",
            "video_end",
        )


class Wanted:
    """Target times still without a frame."""

    def __init__(self, targets: list[int], late_limit: float, *, exact: bool) -> None:
        self.targets = targets
        self.times = frozenset(targets)
        self.late_limit = late_limit
        self.exact = exact
        self.place = 0

    @property
    def done(self) -> bool:
        return self.place == len(self.targets)

    @property
    def pending(self) -> int:
        """The earliest target without a frame; the last one when all have."""
        return self.targets[min(self.place, len(self.targets) - 1)]

    def take(self, time: int, frame: VideoFrame) -> Iterator[VideoFrame | None]:
        """The frame once for each target that it serves; None for a target that has been passed by."""
        while not self.done and self.pending <= time:
            late = time - self.pending
            if late and (self.exact or late > self.late_limit):
                yield None
                return
            self.place += 1
            yield frame


def scan(container: InputContainer, stream: VideoStream) -> Scan:
    """Reads every packet without decoding, except for the first frame, which tells the true size and the rotation."""
    found = Scan()
    entries: list[tuple[int | None, int | None, bool]] = []
    latest: int | None = None
    started = False
    for packet in container.demux():
        if packet.size == 0 or packet.is_corrupt:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            end = float((time + (packet.duration or 0)) * packet.time_base)
            found.ends[packet.stream_index] = max(end, found.ends.get(packet.stream_index, 0.0))
        if packet.stream_index != stream.index:
            continue
        if not entries and not started:
            found.first_packet = (packet.pts, packet.dts)
        started = True
        if found.first_frame is None:
            found.first_frame = _first_frame(packet)
        if packet.is_discard or (not entries and not packet.is_keyframe and found.first_frame is None):
            continue
        entries.append((packet.pts, packet.dts, packet.is_keyframe))
        if packet.pts is not None and (latest is None or packet.pts >= latest):
            latest, found.last_duration = packet.pts, packet.duration or None
    if found.first_frame is None:
        found.first_frame = _first_frame(None, stream)
    _order(found, entries, stream)
    found.ends.setdefault(stream.index, 0.0)
    return found


def _first_frame(packet: av.Packet[Any] | None, stream: VideoStream | None = None) -> VideoFrame | None:
    """The first frame that decodes; damaged packets before it are passed over."""
    try:
        frames = packet.decode() if packet is not None else stream.decode(None) if stream is not None else []
    except av.error.FFmpegError:
        return None
    return next((frame for frame in frames if isinstance(frame, VideoFrame)), None)


def _order(found: Scan, entries: list[tuple[int | None, int | None, bool]], stream: VideoStream) -> None:
    """Fills `times` and `keys`: presentation order, without frames that come before the first decodable one."""
    found.known = all(pts is not None for pts, _, _ in entries)
    if found.known:
        times = [(pts, key) for pts, _, key in entries if pts is not None]
        start = next((pts for pts, key in times if key), min((pts for pts, _ in times), default=0))
        found.times = sorted({pts for pts, _ in times if pts >= start})
        found.keys = sorted({pts for pts, key in times if key})
        return
    rate = stream.average_rate or stream.guessed_rate
    step = 1 if not rate or stream.time_base is None else max(round(1 / (rate * stream.time_base)), 1)
    known = [dts for _, dts, _ in entries if dts is not None]
    distinct = len(set(known)) == len(entries)
    found.times = sorted(known) if distinct else [i * step for i in range(len(entries))]


def packed_rgb(resize: VideoReformatter, frame: VideoFrame, width: int, height: int, threads: int) -> bytes:
    """The frame as RGB bytes without row padding, resized by libswscale's bicubic (antialiasing) filter."""
    picture = resize.reformat(
        frame, width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC, threads=threads
    )
    plane = picture.planes[0]
    row, stride = width * 3, plane.line_size
    data = memoryview(plane)
    if stride == row:
        return bytes(data[: row * height])
    return b"".join(data[i * stride : i * stride + row] for i in range(height))


def _reader(file: BinaryIO, options: dict[str, Any]) -> Reader | AnimationReader:
    if options["animation"]:
        from keye.media.animation_reader import AnimationReader

        return AnimationReader(file, *(options[name] for name in ("pixel_limit", "frame_limit", "track")))
    names = ("threads", "pixel_limit", "frame_limit", "common_only", "track")
    return Reader(file, *(options[name] for name in names))


def serve(file: BinaryIO, requests: BinaryIO, out: BinaryIO, options: dict[str, Any]) -> None:
    """Sends INFO, then answers requests until standard input ends. See the module's docstring."""
    try:
        reader = _reader(file, options)
        facts = json.dumps(reader.info()).encode()
        send(out, INFO, struct.pack("<Q", len(facts)) + facts + array("q", reader.times).tobytes())
        for line in requests:
            request = json.loads(line)
            for frame in reader.frames(*(request[name] for name in ("targets", "width", "height", "deinterlace"))):
                send(out, FRAME, frame)
            send(out, END, b"")
    except WorkerError as error:
        send_error(out, *error.args)
    except MemoryError:
        send_error(out, "needs more memory to decode than the limit allows; re-encode it smaller")
    except av.error.FFmpegError as error:
        send_error(out, f"is damaged ({error.strerror}); download it again or re-encode it")


def _refuse(url: str, flags: int, options: object) -> None:
    raise PermissionError("a media file may not open other files")


def main(arguments: list[str]) -> None:
    """Arguments: the options as JSON, and the inherited descriptor of the media file."""
    options = json.loads(arguments[0])
    for name in (*_LAZY, *([_ANIMATIONS] if options["animation"] else [])):
        with suppress(ImportError):
            import_module(name)
    av.logging.set_level(av.logging.PANIC)
    confine(options["memory_bytes"], options["cpu_seconds"])
    report_crashes(sys.stdout.buffer)
    with os.fdopen(int(arguments[1]), "rb", buffering=0) as file:
        try:
            serve(file, sys.stdin.buffer, sys.stdout.buffer, options)
        except BrokenPipeError:
            # The reader has gone away; leave without the interpreter's own flush of standard output.
            os._exit(0)
