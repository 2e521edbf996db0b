"""Images and the opening of files."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import MediaError
from keye.media.image import plan_image, read_image, resize_image
from keye.media.source.fetch import fetch_source, media_kind

CONFIG = ProcessorConfig()


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Red left half, blue right half."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def claims_size(png: bytes, side: int) -> bytes:
    """A PNG whose header says that it has side x side pixels."""
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.dat"
    path.write_bytes(encoded(picture(), kind))
    source = fetch_source(path)
    assert media_kind(source) == "image"
    image = read_image(source)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    plan = plan_image(source, CONFIG)
    assert (plan.width, plan.height, plan.visual_tokens) == (84, 56, 6)
    assert resize_image(image, CONFIG).shape == (56, 84, 3)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    source = fetch_source(encoded(picture(), "JPEG", exif=exif))
    image = read_image(source)
    assert image.size == (40, 60)
    assert np.asarray(image)[5, 20, 0] > 200  # the left half is now on top
    plan = plan_image(source, CONFIG)
    assert (plan.source_width, plan.source_height) == (40, 60)


def test_alpha_is_dropped() -> None:
    image = Image.new("RGBA", (56, 56), (200, 10, 10, 0))
    assert resize_image(read_image(fetch_source(encoded(image))), CONFIG)[0, 0].tolist() == [200, 10, 10]


def test_requested_size_and_limits() -> None:
    assert resize_image(picture(), CONFIG, MediaOptions(resized_height=100, resized_width=90)).shape == (112, 84, 3)
    assert resize_image(picture(600, 400), CONFIG, MediaOptions(max_pixels=784 * 4)).shape == (28, 56, 3)
    assert resize_image(picture(), CONFIG, MediaOptions(min_pixels=784 * 100)).shape[0] >= 224


def test_bad_images(tmp_path: Path) -> None:
    good = encoded(picture(600, 400), "JPEG")
    for data, message in [
        (b"not an image at all", "is a text file, which is not read"),
        (bytes(range(256)), "is not an image that can be read"),
        (good[: len(good) // 2], "is damaged"),
        (encoded(picture(), "PPM"), "is a Netpbm picture, which is not read; save it as PNG or JPEG"),
    ]:
        with pytest.raises(MediaError, match=message):
            read_image(fetch_source(data))
    with pytest.raises(MediaError, match=r"600x400 pixels, more than the limit"):
        plan_image(fetch_source(good), CONFIG, pixel_limit=1000)
    for side in (12_000, 65_000):
        with pytest.raises(MediaError, match="more than .*100,000,000"):
            read_image(fetch_source(claims_size(encoded(picture()), side)))


def test_a_png_that_is_cut_short() -> None:
    # Its EXIF may stand behind the pixels, so that a plan, which decodes nothing, meets the cut too.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    cut = fetch_source(encoded(noise)[:100_000])
    for use in (read_image, lambda source: plan_image(source, CONFIG)):
        with pytest.raises(MediaError, match="is damaged .*download or export it again"):
            use(cut)


def test_ways_to_name_a_file(tmp_path: Path) -> None:
    data = encoded(picture())
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    for reference in (str(path), path, path.as_uri(), data, f"data:image/png;base64,{text}"):
        source = fetch_source(reference)
        assert source.size == len(data)
        with source.open() as file:
            assert file.read() == data
        with source.open_file() as file:
            assert os.read(file.fileno(), len(data)) == data
    assert fetch_source("data:,a%20b").data == b"a b"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("rtsp://example.org/clip.mp4", "download it first"),
        ("file://elsewhere/clip.mp4", "names another machine"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("/no/such/file.mp4", "does not exist"),
        ("/dev/zero", "is not a regular file"),
        ("a\0b", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        (b"", "is empty"),
    ],
)
def test_bad_references(reference: str | bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        fetch_source(reference)


def test_size_limit() -> None:
    with pytest.raises(MediaError, match="more than the limit"):
        fetch_source(b"12345", max_bytes=4)


def test_animated_gif_is_a_video() -> None:
    still, frames = encoded(picture(), "GIF"), [picture(60, 40).rotate(90 * i) for i in range(3)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert media_kind(fetch_source(still)) == "image"
    assert media_kind(fetch_source(moving)) == "video"
    assert media_kind(fetch_source(moving[:20])) == "image"
    assert media_kind(fetch_source(b"\0\0\0\x20ftypisom")) == "video"
