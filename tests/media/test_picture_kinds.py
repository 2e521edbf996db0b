"""Images of all formats and kinds of pixels: HEIC and AVIF, deep levels, transparency, several pictures."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from keye.compat import utils_preview
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeWarning, MediaError
from keye.media.decode.image_reader import ImageReader
from keye.media.image import open_image, plan_image, read_image, resize_first
from keye.media.pixels.patches import as_picture, in_bytes
from keye.media.source.fetch import fetch_source, media_kind, untrusted

CONFIG = ProcessorConfig()
#: A file of one's own, and an untrusted one.
BOTH = pytest.mark.parametrize(
    "of", [fetch_source, lambda data: untrusted(fetch_source(data))], ids=["own", "untrusted"]
)


def halves(width: int = 64, height: int = 32) -> Image.Image:
    """Red left half, blue right half."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.encode(image.mode, image.size, image.tobytes(), out, quality=95, **options)
    else:
        image.save(out, kind, **options)
    return out.getvalue()


def pixels_of(data: bytes, **options: Any) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyeWarning)
        return np.asarray(read_image(fetch_source(data), **options))


def strangers(files: list[bytes]) -> list[Image.Image]:
    """The images in untrusted files, by one worker."""
    with ImageReader([untrusted(fetch_source(data)) for data in files]) as reader:
        return [in_bytes(image) for image in reader.pictures()]


def heic() -> bytes:
    return saved(halves(), "HEIF")


@BOTH
@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_photos_of_phones(kind: str, of: Any) -> None:
    source = of(saved(halves(), kind))
    assert media_kind(source) == "image"
    plan = plan_image(source, CONFIG)
    assert (plan.source_width, plan.source_height, plan.notes) == (64, 32, ())
    image = read_image(source)
    assert (image.mode, image.size) == ("RGB", (64, 32))
    left, right = image.getpixel((8, 16)), image.getpixel((56, 16))
    assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]  # type: ignore[index,operator]


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_turns_and_mirrors_are_applied_once(kind: str) -> None:
    picture = halves()
    picture.paste((0, 255, 0), (0, 0, 32, 16))
    files, wanted = [], []
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        # Both write the turn into the container too (`irot`, `imir`), as phones do.
        files.append(saved(picture, kind, exif=exif.tobytes()))
        assert (b"irot" in files[-1] or b"imir" in files[-1]) == (turn > 1)
        picture.getexif()[0x0112] = turn
        wanted.append(ImageOps.exif_transpose(picture))
    for image, upright in zip(strangers(files), wanted, strict=True):
        assert image.size == upright.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 8
    assert plan_image(fetch_source(files[5]), CONFIG).source_width == 32


@BOTH
def test_heic_with_transparency_and_with_ten_bits(of: Any) -> None:
    clear = halves().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 32, 32))
    image = read_image(of(saved(clear, "HEIF")))
    assert image.mode == "RGBA" and image.getpixel((8, 8))[3] == 0 and image.getpixel((56, 8))[3] == 255  # type: ignore[index]
    out = io.BytesIO()
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None, :, None].repeat(32, 0).repeat(3, 2)
    pillow_heif.encode("RGB;16", (64, 32), ramp.tobytes(), out, quality=-1)
    displayed = np.asarray(read_image(of(out.getvalue())))[16, :, 1].astype(int)
    assert np.abs(displayed - np.linspace(0, 255, 64)).max() <= 4


def test_damaged_heic_and_avif() -> None:
    for kind in ("HEIF", "AVIF"):
        data = saved(halves(600, 400), kind)
        for cut in (data[:100], data[: len(data) - 40], data[:-1]):
            with pytest.raises(MediaError, match="is cut short; download or export it again"):
                read_image(fetch_source(cut))
        with pytest.raises(MediaError, match="is damaged; download or export it again"):
            read_image(fetch_source(data[:100] + bytes(len(data) - 100)))


def test_a_heic_of_too_many_pixels() -> None:
    with pytest.raises(MediaError, match=r"64x32 pixels, more than the limit of 1,000"):
        plan_image(fetch_source(heic()), CONFIG, pixel_limit=1000)


_PAGES = "it has 3 pages, of which only the first is used; save the others as files of their own"


def test_several_pictures_are_noted() -> None:
    pages = [halves().rotate(90 * i) for i in range(3)]
    tiff = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    file = pillow_heif.from_pillow(pages[0])
    for page in pages[1:]:
        file.add_from_pillow(page)
    out = io.BytesIO()
    file.save(out)
    webp = saved(pages[0], "WEBP", save_all=True, append_images=pages[1:], duration=100)
    for data, message in [
        (tiff, _PAGES),
        (saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], big_tiff=True), _PAGES),
        (out.getvalue(), "it holds 3 pictures, of which only the main one is used"),
        (webp, "it moves, and as an image only its first picture is used; give it as a video for all of it"),
    ]:
        source = fetch_source(data)
        with pytest.warns(KeyeWarning, match=f"^<bytes>: {message}$"):
            plan = plan_image(source, CONFIG)
        assert plan.to_dict()["notes"] == list(plan.notes) == [message]
        with pytest.warns(KeyeWarning, match=f"^<bytes>: {message}$"):
            image = read_image(source)
        assert image.getpixel((8, 16))[0] > 200  # type: ignore[index,operator]
        with warnings.catch_warnings():
            warnings.simplefilter("error", KeyeWarning)
            read_image(source, planned=True)
            plan_image(source, CONFIG, MediaOptions(strict_official=True))


def png(color: int, depth: int, row: bytes, clear: bytes = b"") -> bytes:
    """A PNG of one row of 4 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, color, 0, 0, 0))
    clear = chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + header + clear + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def words(*levels: int) -> bytes:
    return struct.pack(f">{len(levels)}H", *levels)


GREY = (0, 256, 32768, 65535)
RGBA = [[0, 1, 128, 255], [0, 1, 128, 255], [0, 1, 128, 255], [0, 1, 128, 255]]


LEVELS = [
    (png(0, 16, words(*GREY)), [[v] * 3 for v in (0, 1, 128, 255)]),
    (png(0, 16, words(*GREY), words(32768)), [[v] * 3 + [255 * (v != 128)] for v in (0, 1, 128, 255)]),
    (png(2, 16, words(*GREY[:3] * 4)), [[0, 1, 128]] * 4),
    (png(2, 16, words(*GREY[:3] * 3, 0, 0, 0), words(*GREY[:3])), [[0, 1, 128, 0]] * 3 + [[0, 0, 0, 255]]),
    (png(4, 16, words(*GREY[:2] * 2, *GREY[2:] * 2)), [[0, 0, 0, 1]] * 2 + [[128, 128, 128, 255]] * 2),
    (png(6, 16, words(*GREY * 4)), RGBA),
    (png(4, 8, bytes([7, 0, 7, 255] * 2)), [[7, 7, 7, 0], [7, 7, 7, 255]] * 2),
    (png(0, 8, bytes([7, 8, 9, 7]), words(7)), [[7] * 3 + [0], [8] * 3 + [255], [9] * 3 + [255], [7] * 3 + [0]]),
    (png(0, 1, b"\x50"), [[0] * 3, [255] * 3] * 2),
]


@pytest.mark.parametrize(("data", "wanted"), LEVELS)
def test_levels_of_16_bits_and_transparency(data: bytes, wanted: list[list[int]]) -> None:
    assert np.asarray(read_image(fetch_source(data)))[0].tolist() == wanted


def test_levels_of_untrusted_images() -> None:
    for image, (_, wanted) in zip(strangers([data for data, _ in LEVELS]), LEVELS, strict=True):
        assert np.asarray(image)[0].tolist() == wanted
    files = [saved(Image.fromarray(levels[None]), "TIFF") for levels, _ in DEEP_LEVELS]
    for image, (_, deep) in zip(strangers(files), DEEP_LEVELS, strict=True):
        assert np.abs(np.asarray(image)[0, :, 0].astype(int) - deep).max() <= 1


def test_16_bit_tiff_in_both_orders_of_bytes() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    little = saved(Image.fromarray(ramp), "TIFF")
    big = saved(Image.frombytes("I;16B", (256, 4), ramp.astype(">u2").tobytes()), "TIFF")
    for data in (little, big):
        assert pixels_of(data)[0, ::51, 0].tolist() == [0, 51, 102, 153, 204, 255]


DEEP_LEVELS: list[tuple[NDArray[Any], list[int]]] = [
    (np.float32([0, 100.4, 200, 255]), [0, 100, 200, 255]),
    (np.float32([0, 0.2, 0.5, 1]), [0, 51, 128, 255]),
    (np.float32([-10, 0, 5, 10]), [0, 128, 191, 255]),
    (np.float32([np.nan, 0, 500, np.inf]), [0, 0, 255, 255]),
    (np.float32([np.nan] * 4), [0] * 4),
    (np.float32([0] * 4), [0] * 4),
    (np.float32([300] * 4), [0] * 4),
    (np.int32([0, 1, 128, 255]), [0, 1, 128, 255]),
    (np.int32([0, 25_000, 50_000, 100_000]), [0, 64, 128, 255]),
]


@pytest.mark.parametrize(("levels", "wanted"), DEEP_LEVELS)
def test_levels_of_32_bits(levels: NDArray[Any], wanted: list[int]) -> None:
    image = Image.fromarray(levels[None])
    source = fetch_source(saved(image, "TIFF"))
    with pytest.warns(KeyeWarning, match="its levels have 32 bits"):
        plan_image(source, CONFIG)
    for read in (read_image(source, planned=True), as_picture(image)):
        assert np.abs(np.asarray(read)[0, :, 0].astype(int) - wanted).max() <= 1


def preview_image(image: Image.Image) -> Image.Image:
    """A picture in memory as keye prepares it for Preview."""
    return Image.fromarray(resize_first(open_image(image), ProcessorConfig.of("preview"), MediaOptions()))


@pytest.mark.parametrize("mode", ["LA", "La", "P", "PA", "RGBA", "RGBa"])
def test_transparency_of_every_kind_becomes_white_for_preview(mode: str, tmp_path: Path) -> None:
    shape = np.zeros((64, 256, 2), np.uint8)
    shape[16:48, 64:192, 1] = 255
    image: Image.Image = Image.fromarray(shape, "LA")
    if mode == "P":
        image = image.convert("RGBA").quantize(2)
        image.save(tmp_path / "p.png")
        assert "transparency" in Image.open(tmp_path / "p.png").info
        built = utils_preview.fetch_image({"image": str(tmp_path / "p.png")})
    elif mode == "PA":
        image = Image.frombytes("PA", image.size, image.tobytes())
        image.putpalette([0] * 768)
        built = preview_image(image)
    else:
        image = image if mode == "LA" else image.convert("RGBA" if mode == "RGBa" else "LA").convert(mode)
        built = preview_image(image)
        if mode in ("LA", "RGBA"):
            image.save(tmp_path / "a.png")
            again = utils_preview.fetch_image({"image": str(tmp_path / "a.png")})
            assert np.array_equal(np.asarray(built), np.asarray(again))
    assert abs(np.asarray(built).mean() - 191.25) < 1
    official = utils_preview.fetch_image({"image": Image.fromarray(shape, "LA")})
    assert np.asarray(official).mean() == 0, "of a picture in memory the official utilities drop all but RGBA"


def test_other_kinds_of_pixels() -> None:
    grey = Image.new("LAB", (8, 8), (200, 128, 128))
    assert np.ptp(pixels_of(saved(grey, "TIFF"))[0, 0]) <= 2 and pixels_of(saved(grey, "TIFF"))[0, 0, 0] > 150
    assert pixels_of(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert pixels_of(saved(halves(), "ICO", sizes=[(16, 16), (64, 32)])).shape[:2] == (32, 64)
