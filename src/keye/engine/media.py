"""The media of a request, from what the user gave to what will be decoded: classified, checked, planned."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.chat.messages import Medium
from keye.config.media import MediaOptions, media_options
from keye.errors import KeyeError, Option
from keye.media.notes import Note, emit
from keye.media.pixels.patches import is_array
from keye.media.processor import Piece, PlannedMedium, Processor, count_visual_tokens
from keye.media.source.fetch import Source, as_source, is_index, media_kind, parse_list
from keye.models.adapters import Adapter
from keye.models.attention import AttentionMode


@dataclass(frozen=True)
class Frames:
    """A video in memory: an array or tensor with four axes or a list of pictures (uint8 RGB), and the second of each
    frame if it is known."""

    frames: Any
    timestamps: Sequence[float] | None = None


@dataclass(frozen=True)
class VideoIndex:
    """A video that was read before: the first tokens of a prompt up to its end, computed. There are no pixels.

    `token_ids` int64 [P] and `position_ids` int64 [3, P] are what `cache` holds, `next_position` that of the token
    after them. Those from `start` on stand for the video: `pieces`, whose frames were shown at `timestamps`.
    `attention` is the mode that they were computed in, `adapter` the fingerprint of the adapter that changed them.
    """

    name: str
    token_ids: Tensor
    position_ids: Tensor
    next_position: int
    start: int
    pieces: tuple[Piece, ...]
    timestamps: tuple[float, ...]
    plan: Mapping[str, Any]
    attention: AttentionMode
    cache: KVCache
    adapter: str = ""

    @property
    def visual_tokens(self) -> int:
        return count_visual_tokens(self.pieces)


def check_index_attention(indexed: VideoIndex, mode: AttentionMode) -> None:
    """`KeyeError` where a question attends in another mode than the index was computed in."""
    if indexed.attention != mode:
        raise KeyeError(f"{indexed.name} was indexed with {indexed.attention} attention, but the question asks for "
                        f"{mode}: ask with {indexed.attention}, or index the video again")  # fmt: skip


def check_index_adapter(indexed: VideoIndex, adapter: Adapter | None) -> None:
    """`KeyeError` where a question uses another adapter than the index was computed with."""
    if indexed.adapter != ("" if adapter is None else adapter.fingerprint):
        manner = "without an adapter" if adapter is None else f"with the adapter {adapter.name}"
        raise KeyeError(f"{indexed.name} was indexed {'with another adapter' if indexed.adapter else 'without one'}, "
                        f"but the question is asked {manner}: index the video again in that way")  # fmt: skip


#: Opens an index for a model.
OpenIndex = Callable[[Source], VideoIndex]


def as_medium(value: object, options: Mapping[str, Any] | None = None) -> Medium:
    """Any medium that `ask` accepts, its kind found out by looking at it, under `options` that suit its kind.

    A `Medium` brings its own options, and none may be given beside it.
    """
    if options is not None and not isinstance(options, Mapping):
        raise KeyeError(f"media_options is a {type(options).__name__}; give a dictionary such as {{'fps': 1}}")
    values = dict(options or {})
    if isinstance(value, Medium):
        if values:
            names = ", ".join(map(str, values))
            raise KeyeError(f"media_options {names} stand beside a medium with options of its own")
        return check_medium(value)
    if isinstance(value, Image.Image):
        is_image = True
    elif is_array(value):
        is_image = getattr(value, "ndim", 3) != 4
    elif isinstance(value, Frames) or parse_list(value) is not None:
        is_image = False
    else:
        value = as_source(value)
        is_image = media_kind(value) == "image"
    return check_medium(Medium("image" if is_image else "video", value, values))


def check_medium(medium: Medium) -> Medium:
    """The medium itself if its options are right; nothing is opened."""
    _options(medium)
    return medium


def _options(medium: Medium, videos: int = 1) -> MediaOptions:
    values = dict(medium.options)
    if unknown := [name for name in values if not isinstance(name, str)]:
        raise KeyeError(f"{unknown[0]!r} is not an option of {medium.kind}s; options have names such as 'fps'")
    if not isinstance(values.get("strict_official"), bool | None):
        raise KeyeError(f"strict_official is {values['strict_official']!r}; give true or false")
    if isinstance(medium.source, Frames) and medium.source.timestamps is not None:
        values["timestamps"] = medium.source.timestamps
    return media_options(medium.kind, values, video_count=max(videos, 1))


def plan_medium(
    medium: Medium, processor: Processor, videos: int = 1, open_index: OpenIndex | None = None, salt: bytes = b""
) -> PlannedMedium:
    """Fetches and probes one medium of a request with `videos` videos; of a video that was not probed before under
    `salt`, one frame is decoded. Without `open_index` an index of a video is refused."""
    options = _options(medium, videos)
    source = medium.source.frames if isinstance(medium.source, Frames) else medium.source
    is_file = isinstance(source, Source | str | bytes | bytearray | os.PathLike) and parse_list(source) is None
    if medium.kind == "video" and is_file:
        source = as_source(source)
    if medium.kind == "video" and isinstance(source, Source) and is_index(source):
        if names := sorted(name for name, value in medium.options.items() if value is not None):
            listed = " and ".join(["{}"] * len(names))
            raise KeyeError(f"{{}} is an index, whose frames were chosen when it was made; leave {listed} out",
                            source.name, *map(Option, names))  # fmt: skip
        if open_index is None:
            raise KeyeError(f"{source.name} is an index of a video: give the video itself here")
        indexed = open_index(source)
        emit(source.name, [Note(note) for note in indexed.plan.get("notes", ()) if isinstance(note, str)])
        return PlannedMedium("video", indexed, pieces=indexed.pieces)
    return processor.plan(medium.kind, source, options, salt)
