"""Whether media decode: a video's frames at four places, a picture as a whole, by the confined workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media.image import open_image
from keye.media.source.fetch import fetch_source, media_kind
from keye.media.video import VideoReader

_FRAMES: Final = 4


def probe_media(names: Iterable[str]) -> dict[str, str]:
    """Those of the files that cannot be read, and why."""
    return {name: reason for name in names if (reason := _reason(name)) is not None}


def _reason(name: str) -> str | None:
    try:
        source = fetch_source(name)
        if media_kind(source) == "image":
            open_image(source)
            return None
        with VideoReader(source) as reader:
            plan = reader.plan(ProcessorConfig(), MediaOptions(nframes=_FRAMES, strict_media=True))
            for _ in reader.frames(plan):
                pass
    except KeyeError as error:
        return str(error)
    return None
