"""What lists of pictures cost is known from their headers."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media import sizes
from keye.media.image import count_least_list_tokens, open_frames
from keye.media.processor import Processor
from keye.media.source.fetch import Source, untrusted
from keye.releases import find_release


def pictures(count: int, width: int = 200, height: int = 120) -> list[Source]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 90, 200)).save(buffer, "PNG")
    return [Source("picture", buffer.tell(), data=buffer.getvalue()) for _ in range(count)]


def header_of(width: int, height: int) -> Source:
    """A BMP of this size without its pixels, untrusted."""
    data = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return untrusted(Source("picture", len(data), data=data))


@pytest.mark.parametrize(
    "settings",
    [{}, {"fps": 4.0}, {"timestamps": (0.0, 1.0, 2.5, 4.0, 9.0)}, {"min_pixels": 90_000}, {"nframes": 3},
     {"resized_height": 280, "resized_width": 560}, {"timestamps": (0.0, 1.0, 2.5, 4.0, 9.0), "video_end": 3.0}],
)  # fmt: skip
@pytest.mark.parametrize("release", ["2.0", "preview", "1.5"])
def test_tokens_of_a_list_are_those_of_its_item(release: Any, settings: dict[str, Any]) -> None:
    config, options, listed = ProcessorConfig(release=find_release(release)), MediaOptions(**settings), pictures(5)
    item = Processor(config).frames(open_frames(listed), options)
    least = count_least_list_tokens(listed, config, options)
    assert least <= item.visual_tokens if release == "1.5" else least == item.visual_tokens


def test_untrusted_pictures_are_measured_and_not_decoded() -> None:
    options = MediaOptions(timestamps=(0.0,), max_pixels=100 * 28 * 28)
    assert count_least_list_tokens([header_of(2800, 2800)], ProcessorConfig(), options) == 100
    with pytest.raises(KeyeError, match="too many pixels together"):
        count_least_list_tokens([header_of(9000, 8000)] * 6, ProcessorConfig(), MediaOptions())


@pytest.mark.parametrize("pixels", [1e11, 1e12, 1e15])
def test_a_size_beyond_every_context_is_refused(pixels: float) -> None:
    options = MediaOptions(min_pixels=pixels, max_pixels=pixels)
    with pytest.raises(KeyeError, match="more than 268,435,456; lower min_pixels"):
        sizes.compute_image_size(64, 64, ProcessorConfig(), options)
    with pytest.raises(KeyeError, match="lower min_pixels"):
        sizes.compute_frame_sizes(64, 64, 2, ProcessorConfig(), options)


@pytest.mark.parametrize("name", ["fps", "min_pixels", "nframes", "resized_height", "video_total_pixels"])
@pytest.mark.parametrize("value", [10**400, 1e308, 5e-324, float("nan"), float("inf"), -1])
def test_numbers_that_overflow_are_named(name: str, value: float) -> None:
    with pytest.raises(KeyeError, match=name):
        MediaOptions(**{name: value})
