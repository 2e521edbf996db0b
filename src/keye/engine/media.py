"""The media of a request, from what the user gave to what will be decoded: told apart, checked, planned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.chat.messages import Medium, MediumKind
from keye.config import ProcessorConfig
from keye.errors import KeyeError, Option
from keye.media import sizes
from keye.media.content import probed
from keye.media.image import ImagePlan, plan_image
from keye.media.inputs import as_source
from keye.media.listed import least_list_tokens
from keye.media.notes import Note, emit
from keye.media.options import DEFAULTS, MediaOptions, media_options
from keye.media.pixels.pictures import is_array
from keye.media.plan import VideoPlan, make_plan
from keye.media.processor import Piece, Processor, VisualSpan, expand_frames
from keye.media.source.data_urls import parse_list
from keye.media.source.fetch import Source, is_index, media_kind
from keye.models.attention import AttentionMode


@dataclass(frozen=True)
class Frames:
    """A video in memory: an array or tensor with four axes or a list of pictures (uint8 RGB), and the second of each
    frame if it is known."""

    frames: Any
    timestamps: Sequence[float] | None = None


@dataclass(frozen=True)
class IndexedVideo:
    """A video that was read before: the first tokens of a prompt up to its end, computed. There are no pixels.

    `token_ids` int64 [P] and `position_ids` int64 [3, P] are what `cache` holds, `next_position` that of the token
    after them. Those from `start` on stand for the video: `pieces`, whose frames were shown at `timestamps`.
    `attention` is the mode that they were computed in.
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

    @property
    def visual_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces if isinstance(piece, VisualSpan))


def check_index_attention(indexed: IndexedVideo, mode: AttentionMode) -> None:
    """`KeyeError` where a question attends in another mode than the index was computed in."""
    if indexed.attention != mode:
        raise KeyeError(f"{indexed.name} was indexed with {indexed.attention} attention, but the question asks for "
                        f"{mode}: ask with {indexed.attention}, or index the video again")  # fmt: skip


#: Opens an index for a model.
OpenIndex = Callable[[Source], IndexedVideo]


@dataclass(frozen=True)
class PlannedMedium:
    """A medium whose options are known to be right and whose file, if it is one, has been found and probed.

    `source` is a `Source` for a file, an `IndexedVideo`, or pictures in memory or a list of pictures that may be files.
    `plan` and
    `pieces` are what is known before decoding: nothing of pictures in memory or in a list; of a video for 1.5, whose
    fast frames are not told apart yet, the least that can stand for it in the prompt; else exactly that.
    """

    kind: MediumKind
    source: Any
    options: MediaOptions
    plan: VideoPlan | ImagePlan | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of `pieces`."""
        return sum(piece.tokens for piece in self.pieces if isinstance(piece, VisualSpan))


def as_medium(value: object, options: Mapping[str, Any] | None = None) -> Medium:
    """Any medium that `ask` accepts, its kind found out by looking at it, under `options` that suit its kind.

    A `Medium` brings its own options, and none may be given beside it.
    """
    if options is not None and not isinstance(options, Mapping):
        raise KeyeError(f"media_options is a {type(options).__name__}; give a dictionary such as {{'fps': 1}}")
    given = dict(options or {})
    if isinstance(value, Medium):
        if given:
            raise KeyeError(f"media_options {', '.join(map(str, given))} stand beside a medium with options of its own")
        return check_medium(value)
    return check_medium(_told_apart(value, given))


def _told_apart(value: object, options: dict[str, Any]) -> Medium:
    if isinstance(value, Image.Image):
        return Medium("image", value, options)
    if is_array(value):
        return Medium("video" if getattr(value, "ndim", 3) == 4 else "image", value, options)
    if isinstance(value, Frames) or parse_list(value) is not None:
        return Medium("video", value, options)
    source = as_source(value)
    return Medium("image" if media_kind(source) == "image" else "video", source, options)


def check_medium(medium: Medium) -> Medium:
    """The medium itself if its options are right; nothing is opened."""
    _options(medium)
    return medium


def _options(medium: Medium, videos: int = 1) -> MediaOptions:
    given = dict(medium.options)
    if unknown := [name for name in given if not isinstance(name, str)]:
        raise KeyeError(f"{unknown[0]!r} is no option of {medium.kind}s; options have names such as 'fps'")
    if not isinstance(given.get("strict_official"), bool | None):
        raise KeyeError(f"strict_official is {given['strict_official']!r}; give true or false")
    if isinstance(medium.source, Frames) and medium.source.timestamps is not None:
        given["timestamps"] = medium.source.timestamps
    return media_options(medium.kind, given, video_count=max(videos, 1))


def plan_medium(
    medium: Medium, processor: Processor, videos: int = 1, open_index: OpenIndex | None = None, salt: bytes = b""
) -> PlannedMedium:
    """Fetches and probes one medium of a request with `videos` videos; of a video that was not probed before under
    `salt`, one frame is decoded. Without `open_index` an index of a video is refused."""
    options, config = _options(medium, videos), processor.config
    source = medium.source.frames if isinstance(medium.source, Frames) else medium.source
    if isinstance(source, Image.Image) or is_array(source):
        return PlannedMedium(medium.kind, source, options)
    if medium.kind == "image":
        file = as_source(source)
        image = plan_image(file, config, options)
        return PlannedMedium("image", file, options, image, (VisualSpan("image", image.visual_tokens),))
    if isinstance(source, list | tuple) or parse_list(source) is not None:
        if source and isinstance(source, list | tuple) and all(isinstance(one, Source) for one in source):
            return PlannedMedium("video", source, options, None, (_least_of_list(source, config, options),))
        return PlannedMedium("video", source, options)
    file = as_source(source)
    if is_index(file):
        return _planned_index(medium, file, open_index)
    plan = make_plan(probed(file, processor.limits, salt, track=options.track), config, options)
    return PlannedMedium("video", file, options, plan, tuple(_least_pieces(plan, config, options)))


def _least_of_list(pictures: Sequence[Source], config: ProcessorConfig, options: MediaOptions) -> VisualSpan:
    return VisualSpan("video", least_list_tokens(pictures, config, options))


def _planned_index(medium: Medium, file: Source, open_index: OpenIndex | None) -> PlannedMedium:
    check_index_options(file.name, {name for name, value in medium.options.items() if value is not None})
    if open_index is None:
        raise KeyeError(f"{file.name} is an index of a video: give the video itself here")
    indexed = open_index(file)
    emit(file.name, [Note(note) for note in indexed.plan.get("notes", ()) if isinstance(note, str)])
    return PlannedMedium("video", indexed, DEFAULTS, None, indexed.pieces)


def check_index_options(name: str, options: Collection[str]) -> None:
    """`KeyeError` for options beside an index: its frames were chosen when it was made."""
    if options:
        listed = " and ".join(["{}"] * len(options))
        raise KeyeError(f"{{}} is an index, whose frames were chosen when it was made; leave {listed} out",
                        name, *map(Option, sorted(options)))  # fmt: skip


def _least_pieces(plan: VideoPlan, config: ProcessorConfig, options: MediaOptions) -> list[Piece]:
    if config.release.whole_video:
        return [VisualSpan("video", plan.visual_tokens)]
    tokens = plan.tokens_per_frame
    if config.release.classifies_frames:
        # As if all frames were fast: with slow ones among them both kinds get at least as many tokens.
        height, width = sizes.frame_sizes(plan.source_height, plan.source_width, plan.frames, config, options).fast
        tokens = (height // config.factor) * (width // config.factor)
    return expand_frames([tokens] * plan.frames, config, plan.labels)
