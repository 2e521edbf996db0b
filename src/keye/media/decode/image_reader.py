"""Images decoded by a confined process (`image_worker`): this side asks and checks what comes back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any, BinaryIO

from PIL import Image

from keye.errors import MediaError
from keye.media.container.kinds import HEAD_BYTES, find_heif_format
from keye.media.decode.picture import MAX_IMAGE_PIXELS
from keye.media.decode.wire import FRAME, INFO
from keye.media.decode.workers import DecodeLimits, Worker
from keye.media.source.fetch import Source

#: What the images of one request may cost their worker.
IMAGE_LIMITS = DecodeLimits(memory_bytes=2 * 1024**3, cpu_seconds=60, wait_seconds=60.0, total_seconds=120.0)
#: Most pixels of the pictures of one list together: 1.2 GB as RGB.
MAX_LIST_PIXELS = 400_000_000
#: Bytes of a pixel in the modes that the worker sends.
_PIXEL_BYTES = {"RGB": 3, "RGBA": 4, "I": 4, "F": 4}
_MAX_FACTS = 1 << 10


@dataclass(frozen=True)
class Header:
    """The beginning of an image file: size as stored in pixels, EXIF orientation, number of pictures, Pillow mode."""

    width: int
    height: int
    orientation: int
    pictures: int
    mode: str


def heif_version() -> str | None:
    """The version of what reads HEIC; None where it is missing. It is not loaded into this process."""
    try:
        return version("pillow-heif")
    except PackageNotFoundError:
        return None


def is_confined(source: Source) -> bool:
    """Whether an image has to be read here."""
    return source.untrusted or find_heif_format(source.head(HEAD_BYTES)) is not None


class ImageReader:
    """Open images with their worker. Use as a context manager; closing kills the worker."""

    def __init__(self, sources: Sequence[Source], limits: DecodeLimits = IMAGE_LIMITS) -> None:
        assert sources
        self.sources = sources
        self._offsets = list(accumulate((source.size for source in sources), initial=0))
        formats = {find_heif_format(source.head(HEAD_BYTES)) for source in sources}
        with _joined(sources) as file:
            self.worker = Worker(
                "keye.media.decode.image_worker", file, {"formats": sorted(formats - {None})}, limits,
                name=sources[0].name, what="image decoder", untrusted=True,
            )  # fmt: skip

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.close()

    def header(self, index: int, pixel_limit: int = MAX_IMAGE_PIXELS) -> Header:
        """What is known of one image before it is decoded."""
        names = tuple(Header.__dataclass_fields__)
        header = Header(**self._ask(index, pixel_limit, names, pixels=False))
        numbers = all(isinstance(value, int) for value in (header.orientation, header.pictures))
        if not self._fits(header.width, header.height, pixel_limit) or not numbers:
            raise self.worker.broken()
        return header

    def picture(self, index: int, pixel_limit: int = MAX_IMAGE_PIXELS, *, strict_official: bool = False) -> Image.Image:
        """One image, decoded, as `picture.upright` gives it."""
        facts = self._ask(index, pixel_limit, ("width", "height", "mode"), pixels=True, strict_official=strict_official)
        width, height, mode = facts["width"], facts["height"], facts["mode"]
        if mode not in _PIXEL_BYTES or not self._fits(width, height, pixel_limit):
            raise self.worker.broken()
        size = width * height * _PIXEL_BYTES[mode]
        kind, body = self.worker.receive(size)
        if kind != FRAME or len(body) != size:
            raise self.worker.broken()
        return Image.frombuffer(mode, (width, height), body, "raw", mode, 0, 1)

    def pictures(self, total: int = MAX_LIST_PIXELS) -> list[Image.Image]:
        """All images, of at most `total` pixels together."""
        pictures: list[Image.Image] = []
        for index in range(len(self.sources)):
            pictures.append(self.picture(index))
            total -= pictures[-1].width * pictures[-1].height
            if total < 0:
                raise MediaError(
                    f"the pictures of {self.sources[index].name} have too many pixels together; "
                    "shrink them or send a video file"
                )
        return pictures

    def _ask(self, index: int, pixel_limit: int, names: tuple[str, ...], **request: object) -> dict[str, Any]:
        self.worker.name = self.sources[index].name
        place = {"offset": self._offsets[index], "length": self.sources[index].size, "pixel_limit": pixel_limit}
        self.worker.request(place | request)
        kind, body = self.worker.receive(_MAX_FACTS)
        try:
            facts = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise self.worker.broken() from None
        if kind != INFO or not isinstance(facts, dict) or set(facts) != set(names):
            raise self.worker.broken()
        return facts

    @staticmethod
    def _fits(width: object, height: object, pixel_limit: int) -> bool:
        return isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 \
            and width * height <= pixel_limit  # fmt: skip


@contextmanager
def _joined(sources: Sequence[Source]) -> Iterator[BinaryIO]:
    """One open file with the bytes of all sources, one after the other."""
    if len(sources) == 1:
        with sources[0].open_file() as file:
            yield file
        return
    with tempfile.TemporaryFile() as joined:
        for source in sources:
            with source.open() as file:
                joined.write(file.read())
        joined.seek(0)
        yield joined
