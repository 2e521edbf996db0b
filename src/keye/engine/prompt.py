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
from keye.media.fetch import jpeg_list, media_kind
from keye.media.inputs import as_source, open_frames
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
        if isinstance(source, Frames):
            given["timestamps"], source = source.timestamps, source.frames
        options = media_options(medium.kind, given, video_count=max(videos, 1))
        if medium.kind == "image":
            in_memory = isinstance(source, Image.Image) or is_array(source)
            return self.processor.image(source if in_memory else as_source(source), options)
        frames = open_frames(source)
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
