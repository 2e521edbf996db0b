"""From a conversation to what the model computes: token ids, positions, patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keye.chat import ChatTemplate, Medium, Message, render
from keye.config import KeyeConfig
from keye.errors import KeyeError
from keye.media.fetch import Source, fetch_source, jpeg_list, media_kind
from keye.media.image import read_image
from keye.media.options import media_options
from keye.media.patches import VisionInput
from keye.media.pictures import is_array
from keye.media.positions import build_position_ids
from keye.media.processor import MediaItem, Processor, VisualSpan
from keye.tokenizer import Tokenizer


@dataclass(frozen=True)
class Frames:
    """A video in memory: an array or tensor with four axes or a list of pictures (uint8 RGB), and the second of each
    frame if it is known."""

    frames: Any
    timestamps: Sequence[float] | None = None


@dataclass(frozen=True)
class Prompt:
    """`token_ids` int64 [T]; `position_ids` int64 [3, T]; `next_position` of the first generated token; the media."""

    token_ids: Tensor
    position_ids: Tensor
    next_position: int
    media: tuple[MediaItem, ...]

    @property
    def media_tokens(self) -> int:
        return sum(item.visual_tokens for item in self.media)

    def vision(self) -> tuple[Tensor, Tensor] | None:
        """Patches and grids of all media in order, or None without media."""
        if not self.media:
            return None
        return VisionInput.concatenate([item.vision for item in self.media]).tensors()


class PromptBuilder:
    """Builds prompts for one model."""

    def __init__(self, config: KeyeConfig, tokenizer: Tokenizer, processor: Processor) -> None:
        self.config, self.tokenizer, self.processor = config, tokenizer, processor
        self._pad = {"image": config.image_token_id, "video": config.video_token_id}

    def build(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        template: ChatTemplate | None = None,
        thinking: bool | None = None,
    ) -> Prompt:
        """Renders, opens and decodes the media, and lays out tokens and positions."""
        segments = render(messages, template=template, thinking=thinking)
        videos = sum(s.kind == "video" for s in segments)
        ids: list[int] = []
        items: list[MediaItem] = []
        for segment in segments:
            if isinstance(segment.value, Medium):
                item = self.open(segment.value, videos)
                items.append(item)
                ids += self._media_ids(item)
            else:
                ids += self.tokenizer.encode(segment.value, special=segment.kind == "template")
        return self._lay_out(ids, items)

    def open(self, medium: Medium, videos: int = 1) -> MediaItem:
        """Fetches and processes one medium under its own options."""
        given: dict[str, Any] = dict(medium.options)
        source = medium.source
        if isinstance(source, Frames) and source.timestamps is not None:
            given["timestamps"] = source.timestamps
        options = media_options(medium.kind, given, video_count=max(videos, 1))
        if medium.kind == "image":
            return self.processor.image(as_picture_source(source), options)
        frames = frames_of(source)
        if frames is not None:
            return self.processor.frames(frames, options)
        return self.processor.video(as_source(source), options)

    def _media_ids(self, item: MediaItem) -> list[int]:
        ids: list[int] = []
        for piece in item.pieces:
            if isinstance(piece, VisualSpan):
                ids += [self._pad[piece.kind]] * piece.tokens
            else:
                ids += self.tokenizer.encode(piece, special=True)
        return ids

    def _lay_out(self, ids: list[int], items: list[MediaItem]) -> Prompt:
        grids = {}
        for kind in ("image", "video"):
            rows = [item.vision.grid_thw for item in items if item.kind == kind]
            if rows:
                grids[self._pad[kind]] = np.concatenate(rows)
        positions, delta = build_position_ids(ids, grids, merge_size=self.config.vision.spatial_merge_size)
        return Prompt(torch.tensor(ids), torch.from_numpy(positions), len(ids) + delta, tuple(items))


def as_source(value: object) -> Source:
    """A path, URL or bytes as a `Source`; `KeyeError` for anything else."""
    if isinstance(value, Source):
        return value
    if isinstance(value, str | bytes) or hasattr(value, "__fspath__"):
        return fetch_source(value)
    raise KeyeError(
        f"a medium must be a path, URL, bytes, a PIL image, an array, a tensor or Frames, not {type(value).__name__}"
    )


def as_picture_source(value: object) -> object:
    """What `Processor.image` takes: pictures in memory as they are, all else as a `Source`."""
    return value if isinstance(value, Image.Image) or is_array(value) else as_source(value)


def frames_of(value: object) -> Any:
    """The frames of a video that is given as pictures: `Frames`, an array or tensor, a list of pictures (files or in
    memory), or a data URL of several JPEG images; None for a video file."""
    if isinstance(value, Frames):
        value = value.frames
    if is_array(value):
        return value
    pictures = value if isinstance(value, list | tuple) else jpeg_list(value)
    if pictures is None:
        return None
    sources = (as_picture_source(picture) for picture in pictures)
    return [read_image(picture) if isinstance(picture, Source) else picture for picture in sources]


def as_medium(value: object, **options: Any) -> Medium:
    """Any medium that `ask` accepts, its kind found out by looking at it."""
    if isinstance(value, Medium):
        return value
    if isinstance(value, Image.Image):
        return Medium("image", value, options)
    if is_array(value):
        return Medium("video" if getattr(value, "ndim", 3) == 4 else "image", value, options)
    if isinstance(value, Frames) or jpeg_list(value) is not None:
        return Medium("video", value, options)
    source = as_source(value)
    return Medium("image" if media_kind(source) == "image" else "video", source, options)
