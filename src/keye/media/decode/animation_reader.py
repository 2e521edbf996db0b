"""Animated WebP and APNG as videos, read with Pillow on white: FFmpeg reads no frames of a WebP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, BinaryIO

import av
from PIL import Image, WebPImagePlugin

from keye.media.container.animations import is_webp, png_times, webp_times
from keye.media.decode.display import display_facts
from keye.media.decode.picture import DAMAGE, in_color, open_picture
from keye.media.decode.thumbnails import interleave, wanted_times
from keye.media.decode.wire import WorkerError

#: Times of frames are in this unit, in seconds, in which those of both formats are whole or nearly so.
TIME_BASE = Fraction(1, 90_000)
# Pillow would import its plug-ins when a file needs them, which is too late for a confined process.
Image.preinit()
assert WebPImagePlugin.WebPImageFile.format in Image.OPEN


class AnimationReader:
    """One animation, opened. `times` are when its frames begin, in units of `TIME_BASE`."""

    def __init__(self, file: BinaryIO, pixel_limit: int, frame_limit: int, track: int | None = None) -> None:
        if track not in (None, 1):
            raise WorkerError("is an animation, which has one track; leave {} out", "track")
        self.file, self.pixel_limit = file, pixel_limit
        self.damage: list[int] = []
        self.resized: list[tuple[int, int, int]] = []
        self.format = "webp" if is_webp(file) else "apng"
        try:
            spans = webp_times(file) if self.format == "webp" else png_times(file)
        except ValueError:
            raise WorkerError("is cut short; download or export it again") from None
        if len(spans) > frame_limit:
            raise WorkerError(f"has {len(spans):,} frames, more than the limit of {frame_limit:,}; cut it into parts")
        self.size = self._open().size
        ticks = [round(end / TIME_BASE) for end in accumulate(spans, initial=Fraction(0))]
        self.times, self.end = ticks[:-1], ticks[-1]

    def info(self) -> dict[str, Any]:
        """Facts for `keye.media.video.VideoInfo`."""
        end, (width, height) = float(self.end * TIME_BASE), self.size
        return {
            **display_facts(av.VideoFrame(*self.size, "rgb24"), None, self.pixel_limit),
            "format": self.format, "codec": self.format, "rate": None,
            "track": 1, "tracks": [f"1: {width}x{height} {self.format}"], "track_asked": False,
            "time_base": [TIME_BASE.numerator, TIME_BASE.denominator], "container_start": 0.0, "declared_end": end,
            "declared_frames": len(self.times), "readable_end": end, "known_times": True,
            "last_duration": self.end - self.times[-1],
        }  # fmt: skip

    def frames(
        self, targets: list[int], width: int, height: int, deinterlace: bool, strict: bool, scan: list[int] | None
    ) -> Iterator[tuple[bytes, bytes]]:
        """RGB bytes (height x width x 3) of the frames that begin at the target times, ascending, as messages (kind,
        body), those with thumbnails of the frames in `scan` among them."""
        pictures = self._pictures(wanted_times(targets, self.times, scan))
        return interleave(pictures, targets, scan, _resize, (width, height))

    def _pictures(self, times: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        image = self._open()
        first = int(getattr(image, "default_image", False))  # A PNG may show another picture where nothing moves.
        wanted = frozenset(times)
        for number, time in enumerate(self.times):
            if not times or time > times[-1]:
                return
            if time not in wanted:
                continue
            try:
                image.seek(first + number)
                picture = _on_white(in_color(image))
                picture.load()
            except DAMAGE:
                seconds = float(time * TIME_BASE)
                raise WorkerError(f"is damaged near {seconds:.1f} s; download or export it again") from None
            yield time, picture

    def _open(self) -> Image.Image:
        self.file.seek(0)
        return open_picture(self.file, self.pixel_limit, ("WEBP", "PNG"))


def _resize(picture: Image.Image, width: int, height: int) -> bytes:
    return picture.resize((width, height), Image.Resampling.BICUBIC).tobytes()


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    return white
