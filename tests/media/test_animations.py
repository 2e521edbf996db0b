"""Animated WebP, PNG, GIF and AVIF as videos: every frame at its time, transparency on white, damage as a sentence."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeWarning, MediaError
from keye.media.clips import cut_clips
from keye.media.image import read_image
from keye.media.source.fetch import fetch_source, media_kind, untrusted
from keye.media.video import DecodeLimits, VideoReader, probe

CONFIG = ProcessorConfig()
TIMES = (100, 40, 250, 100, 1000)


def shade(number: int) -> Image.Image:
    return Image.new("RGB", (64, 32), (40 * number, 250 - 40 * number, 90))


def animation(kind: str, times: tuple[int, ...] = TIMES, **options: Any) -> bytes:
    """Frames of one colour each, shown for these times in milliseconds."""
    out = io.BytesIO()
    frames = [shade(number) for number in range(len(times))]
    more = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        out, kind, save_all=True, append_images=frames[1:], duration=list(times), **more, **options
    )  # fmt: skip
    return out.getvalue()


def read(source: Any, count: int) -> tuple[list[float], list[int]]:
    """Times and red levels of `count` frames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyeWarning)
        with VideoReader(source) as reader:
            plan = reader.plan(CONFIG, MediaOptions(nframes=count))
            frames = reader.read(plan)
    return [round(time, 3) for time in plan.timestamps], [int(frame[8, 8, 0]) for frame in frames]


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_every_frame_has_its_time(kind: str) -> None:
    source = untrusted(fetch_source(animation(kind)))
    assert media_kind(source) == "video"
    info = probe(source)
    assert (info.width, info.height, info.frame_count, info.duration) == (64, 32, 5, 1.49)
    assert [round(time, 3) for time in info.timestamps] == [0, 0.1, 0.14, 0.39, 0.49]
    assert info.exact_times and not info.constant_rate and not info.cut_short
    times, reds = read(source, 5)
    begins = [0, 0.1, 0.14, 0.39, 0.49]
    assert [round(red / 40) for red in reds] == [begins.index(time) for time in times]


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_the_frames_asked_for_are_read(kind: str) -> None:
    times, reds = read(fetch_source(animation(kind, (100,) * 7)), 7)
    assert times == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert reds == [0, 40, 80, 120, 160, 200, 240]
    assert read(fetch_source(animation(kind, (100,) * 7)), 3) == ([0, 0.3, 0.6], [0, 120, 240])


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_times_too_short_to_see_are_those_of_browsers(kind: str) -> None:
    assert probe(fetch_source(animation(kind, (0, 10, 20)))).duration == 0.22


def test_thirds_of_a_second_in_a_png() -> None:
    data = bytearray(animation("PNG", (100,) * 4))
    place = 0
    while (place := data.find(b"fcTL", place + 1)) > 0:
        struct.pack_into(">HH", data, place + 24, 1, 30)
        struct.pack_into(">I", data, place + 30, zlib.crc32(data[place : place + 30]))
    info = probe(fetch_source(bytes(data)))
    assert [time * info.time_base for time in info.pts] == [Fraction(i, 30) for i in range(4)]
    assert (info.fps, info.constant_rate) == (30.0, True)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_transparency_is_white(kind: str) -> None:
    frames = [Image.new("RGBA", (64, 32), (40 * i, 0, 0, 0 if i == 1 else 255)) for i in range(3)]
    out = io.BytesIO()
    more = {"lossless": True} if kind == "WEBP" else {"blend": 0}
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100, **more)  # type: ignore[arg-type]
    assert read(fetch_source(out.getvalue()), 3)[1] == [0, 255, 80]


def test_the_still_picture_of_an_animated_png_is_not_a_frame() -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 32), (255, 255, 255)).save(
        out, "PNG", save_all=True, append_images=[shade(i) for i in range(3)], duration=100, default_image=True
    )
    source = fetch_source(out.getvalue())
    assert read(source, 3) == ([0, 0.1, 0.2], [0, 40, 80])
    with pytest.warns(KeyeWarning, match="it moves, and as an image only its first picture is used"):
        assert read_image(source).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_damaged_animations(kind: str) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100)
    data = out.getvalue()
    with pytest.raises(MediaError, match="is cut short; download or export it again"):
        probe(fetch_source(data[: len(data) * 2 // 3]))
    broken = bytearray(data)
    broken[len(data) * 2 // 3 : len(data) * 2 // 3 + 3000] = bytes(3000)
    with pytest.raises(MediaError, match=r"is damaged near 0\.\d s; download|is cut short; download"):
        read(fetch_source(bytes(broken)), 4)


def test_limits_of_animations() -> None:
    source = fetch_source(animation("WEBP"))
    for limits, message in [
        (DecodeLimits(frames=4), "has 5 frames, more than the limit of 4"),
        (DecodeLimits(frame_pixels=2000), "has 64x32 pixels, more than the limit of 2,000"),
        (DecodeLimits(duration=1.0), "lasts 1 s, more than the limit of 1 s"),
    ]:
        with pytest.raises(MediaError, match=message):
            probe(source, limits)
    with pytest.raises(MediaError, match="is an animation, which has one track; leave track out"):
        probe(source, track=2)


def test_clips_of_an_animation(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(animation("WEBP", (200,) * 5))
    (clip,) = cut_clips(tmp_path / "a.webp", [(0.2, 0.8)], tmp_path)
    assert probe(clip).frame_count == 3
