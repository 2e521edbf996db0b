"""Video files: what is in them, which frames are taken and what they cost, and the frames themselves.

All decoding happens in a worker process (`decode.video_worker`) under limits; this side plans and receives. Times are
seconds on the clock that players show: the container's own presentation times, counted from the container's start.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import KeyeError, MediaError, warn
from keye.media.container.kinds import is_png_or_webp
from keye.media.decode import wire
from keye.media.decode.thumbnails import BATCH
from keye.media.decode.thumbnails import BYTES as THUMBNAIL_BYTES
from keye.media.decode.thumbnails import HEIGHT as THUMBNAIL_HEIGHT
from keye.media.decode.thumbnails import WIDTH as THUMBNAIL_WIDTH
from keye.media.decode.wire import END, FRAME, INFO, SOUND, THUMBNAILS
from keye.media.decode.workers import UNTRUSTED_LIMITS, Worker
from keye.media.decode.workers import DecodeLimits as DecodeLimits
from keye.media.info import VideoInfo, note_size_changes, parse_info
from keye.media.notes import emit, warn_decoded_damage
from keye.media.pixels.patches import Pixels
from keye.media.pixels.tone_map import to_sdr
from keye.media.plan import VideoPlan, make_plan
from keye.media.source.fetch import Reference, check_video, fetch_source

#: Longest description of a file, in bytes, without its frames' times.
_MAX_FACTS = 1 << 16


class FrameScan(Protocol):
    """What looks at all `frames` of a video, in small, in the same pass as others are sampled."""

    @property
    def frames(self) -> range:
        """Numbers of consecutive frames of the file."""

    def push(self, thumbnails: Pixels) -> None:
        """The next of its frames, uint8 RGB [frames, 18, 32, 3], in whatever shape the video has, before they are
        turned upright. Frames at the end that cannot be decoded do not come."""


class VideoReader:
    """An open video with its worker process. Use as a context manager; closing kills the worker.

    Without `limits`, `workers.UNTRUSTED_LIMITS` hold for an untrusted source. Raises `MediaError` on
    opening when the file is not a readable video or breaks a limit; without `wait`, when its facts or frames are read.
    """

    def __init__(
        self, source: Reference, limits: DecodeLimits | None = None, *, track: int | None = None, wait: bool = True
    ) -> None:
        source = fetch_source(source, max_bytes=(limits or DecodeLimits()).file_bytes)
        self.limits = limits or (UNTRUSTED_LIMITS if source.untrusted else DecodeLimits())
        self.source = fetch_source(source, max_bytes=self.limits.file_bytes)
        check_video(source)
        options = {
            "threads": self.limits.threads, "pixel_limit": self.limits.frame_pixels, "frame_limit": self.limits.frames,
            "common_only": self.source.untrusted, "track": track, "animation": is_png_or_webp(self.source.head()),
        }  # fmt: skip
        with self.source.open_file() as file:
            self.worker = Worker("keye.media.decode.video_worker", file, options, self.limits, name=self.source.name,
                                 what="video decoder", untrusted=self.source.untrusted)  # fmt: skip
        #: How many times frames were asked for, and the bytes of each frame that may still come.
        self._requests = self._coming = 0
        #: Of the sound read last, how many packets did not decode.
        self.sound_faults = 0
        try:
            if wait:
                _ = self.info
        except BaseException:
            self.close()
            raise

    @cached_property
    def info(self) -> VideoInfo:
        """Facts about the file, which the worker sends first of all."""
        kind, body = self.worker.receive(_MAX_FACTS + 8 * self.limits.frames)
        try:
            info = parse_info(self.source.name, kind, body)
        except (ValueError, TypeError, LookupError, ArithmeticError, struct.error):
            # Our own worker sends none such, but one that a file has taken over may.
            raise self.worker.broken() from None
        if info.duration > self.limits.duration:
            raise MediaError(
                f"{self.source.name} lasts {info.duration:.0f} s, more than the limit of {self.limits.duration:g} s; "
                "cut it into parts"
            )
        return info

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker. May be called more than once."""
        self.worker.close()

    def stop(self) -> None:
        """Kills the worker; a reader in another thread gets an error, and closes."""
        self.worker.stop()

    def plan(self, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> VideoPlan:
        """Which frames would be sampled and what they would cost."""
        return make_plan(self.info, config, options)

    def frames(self, plan: VideoPlan, *, native: bool = False, scan: FrameScan | None = None) -> Iterator[Pixels]:
        """The planned frames one by one, upright, uint8 RGB [height, width, 3].

        They come at the planned size, shrunk by the worker while it decodes, or at the file's own size if `native`.
        `scan` gets thumbnails of all its frames in the same pass, which then leaves no frame out; it is complete when
        the iterator has ended.
        """
        width, height = (plan.source_width, plan.source_height) if native else (plan.width, plan.height)
        if plan.rotation % 180:
            width, height = height, width
        request = {"targets": plan.pts, "width": width, "height": height, "deinterlace": plan.deinterlace,
                   "strict": plan.strict_media}  # fmt: skip
        for body in self._answer(request, plan.frames, scan, plan.name):
            frame = np.frombuffer(body, dtype=np.uint8).reshape(height, width, 3)
            rotated = np.rot90(frame, plan.rotation // 90)
            upright = np.ascontiguousarray(rotated[:, ::-1] if plan.mirrored else rotated)
            yield upright if plan.tone_map is None else to_sdr(upright, plan.tone_map)

    def scan(self, scan: FrameScan) -> None:
        """Gives `scan` thumbnails of all its frames."""
        request = {"targets": [], "width": 1, "height": 1, "deinterlace": False, "strict": False}
        for _ in self._answer(request, 0, scan, self.source.name):
            raise self.worker.broken()

    def _answer(self, request: dict[str, Any], frames: int, scan: FrameScan | None, name: str) -> Iterator[bytearray]:
        """Bytes of each frame that a request asks for; thumbnails go to `scan`."""
        pts = self.info.pts  # comes before any frame
        self._give_up_frames()
        length, unseen = request["width"] * request["height"] * 3, 0 if scan is None else len(scan.frames)
        self._requests, self._coming = self._requests + 1, max(length, THUMBNAIL_BYTES * BATCH)
        number = self._requests
        span = [pts[scan.frames[0]], pts[scan.frames[-1]]] if scan is not None and unseen else None
        self.worker.request({**request, "scan": span})
        while True:
            kind, body = self.worker.receive(max(self._coming, _MAX_FACTS))
            if kind == FRAME and len(body) == length and frames:
                frames -= 1
                yield body
            elif kind == THUMBNAILS and scan is not None and 0 < len(body) <= THUMBNAIL_BYTES * BATCH:
                thumbnails = np.frombuffer(body, dtype=np.uint8).reshape(-1, THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH, 3)
                unseen -= len(thumbnails)
                if unseen < 0:
                    raise self.worker.broken()
                scan.push(thumbnails)
            else:
                break
            if number != self._requests and not frames:
                return
            if number != self._requests:
                raise KeyeError("frames of another plan were asked for meanwhile; read one plan after the other")
        if kind != END or frames:
            raise self.worker.broken()
        self._end(name, body)

    def starts(self) -> list[int]:
        """Numbers of the frames that decoding can begin with, ascending: those cost least. None of animations."""
        self._give_up_frames()
        self._requests += 1
        self.worker.request({"starts": True})
        kind, body = self.worker.receive(8 * self.info.frame_count)
        numbers = {time: number for number, time in enumerate(self.info.pts)}
        try:
            starts = [numbers[time] for time in array("q", bytes(body))]
        except (ValueError, LookupError):
            raise self.worker.broken() from None
        if kind != INFO or starts != sorted(set(starts)):
            raise self.worker.broken()
        return starts

    def sound(self, begin: float, end: float) -> Iterator[NDArray[np.float32]]:
        """The sound from `begin` to `end` seconds as players count them, float32 [samples, channels] piece by piece:
        exactly as many samples as the time has at `sound_form`, silence where the file has none; no piece where it has
        none at all. Then `sound_faults` is the number of packets that did not decode. `info.sound` must be readable."""
        assert self.info.sound is not None and self.info.sound.is_readable
        rate, channels = self.sound_form
        self._give_up_frames()
        self._requests += 1
        self.worker.request({"sound": [begin, end]})
        left = round((end - begin) * rate)
        while (message := self.worker.receive(max(4 * channels * rate, _MAX_FACTS)))[0] == SOUND:
            body = message[1]
            left -= len(body) // (4 * channels)
            if not body or len(body) % (4 * channels) or left < -1:
                raise self.worker.broken()
            yield np.frombuffer(body, dtype=np.float32).reshape(-1, channels)
        try:
            self.sound_faults = int(json.loads(bytes(message[1]))["faults"])
        except (ValueError, TypeError, LookupError):
            raise self.worker.broken() from None

    @property
    def sound_form(self) -> tuple[int, int]:
        """Sample rate and channels of what `sound` gives: at most two channels, a rate that AAC has."""
        assert self.info.sound is not None
        return wire.sound_form(self.info.sound.rate, self.info.sound.channels)

    def _give_up_frames(self) -> None:
        """Has the worker leave out frames that were asked for and not read."""
        if self._coming:
            self.worker.request({})
            while self.worker.receive(max(self._coming, _MAX_FACTS))[0] in (FRAME, THUMBNAILS):
                continue
            self._coming = 0

    def _end(self, name: str, body: bytearray) -> None:
        """Reads the end of an answer, and warns of frames that turned out to be damaged or of another size."""
        self._coming = 0
        try:
            answer = json.loads(bytes(body))
            damage = array("q", answer["damaged"])
            sizes = [tuple(array("q", change)) for change in answer["resized"]]
            resized = list(note_size_changes(self.info, [(time, width, height) for time, width, height in sizes]))
        except (ValueError, TypeError, LookupError, OverflowError):
            raise self.worker.broken() from None
        if (warning := warn_decoded_damage(name, self.info.seconds(damage), self.info.damage)) is not None:
            warn(warning, stacklevel=3)
        emit(name, resized, stacklevel=3)

    def read(self, plan: VideoPlan) -> NDArray[np.uint8]:
        """All planned frames, uint8 RGB [frames, height, width, 3]."""
        frames = np.empty((plan.frames, plan.height, plan.width, 3), dtype=np.uint8)
        for i, frame in enumerate(self.frames(plan)):
            frames[i] = frame
        return frames


def probe(source: Reference, limits: DecodeLimits | None = None, *, track: int | None = None) -> VideoInfo:
    """Facts about a video file; reads all packets, decodes one frame."""
    with VideoReader(source, limits, track=track) as reader:
        return reader.info


def plan_video(
    source: Reference, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, limits: DecodeLimits | None = None
) -> VideoPlan:
    """Which frames would be sampled from a video and what they would cost.

    Raises `MediaError` for a file that cannot be used, `KeyeError` for options that contradict the video.
    """
    with VideoReader(source, limits, track=options.track) as reader:
        return reader.plan(config, options)


def iter_frames(
    plan: VideoPlan, source: Reference, *, limits: DecodeLimits | None = None
) -> Generator[NDArray[np.uint8], None, None]:
    """The planned frames one by one, uint8 RGB [height, width, 3]. Closing the generator ends the worker."""
    with VideoReader(source, limits, track=plan.track) as reader:
        yield from reader.frames(plan)
