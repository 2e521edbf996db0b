"""From a conversation to what the model computes: token ids, positions, patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from keye.chat import ChatTemplate, CheckpointTemplate, Medium, Message, Segment, render
from keye.config import KeyeConfig
from keye.media.fetch import jpeg_list, media_kind
from keye.media.inputs import as_source, open_frames
from keye.media.options import media_options
from keye.media.patches import VisionInput
from keye.media.pictures import is_array
from keye.media.positions import PreviewLayout, build_position_ids
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
        template: ChatTemplate | CheckpointTemplate | None = None,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """Renders, opens and decodes the media, and lays out tokens and positions."""
        if isinstance(template, CheckpointTemplate):
            segments = template.render(messages, thinking=thinking, tools=tools)
        else:
            segments = render(messages, template=template, thinking=thinking, tools=tools)
        return self.lay_out(segments)

    def lay_out(self, segments: Sequence[Segment]) -> Prompt:
        """Opens and decodes the media of a rendered prompt, and gives every token its id and position."""
        videos = sum(s.kind == "video" for s in segments)
        ids: list[int] = []
        items: list[MediaItem] = []
        texts: list[tuple[str, bool]] = []
        for segment in segments:
            if isinstance(segment.value, Medium):
                ids += self.tokenizer.encode_parts(texts)
                texts.clear()
                item = self.open(segment.value, videos)
                items.append(item)
                ids += self._media_ids(item)
            else:
                texts.append((segment.value, segment.kind == "template"))
        return self._positioned(ids + self.tokenizer.encode_parts(texts), items)

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

    def _positioned(self, ids: list[int], items: list[MediaItem]) -> Prompt:
        grids = {}
        for kind in ("image", "video"):
            rows = [item.vision.grid_thw for item in items if item.kind == kind]
            if rows:
                grids[self._pad[kind]] = np.concatenate(rows)
        merge, preview = self.config.vision.spatial_merge_size, self._preview_layout(items)
        positions, delta = build_position_ids(ids, grids, merge_size=merge, preview=preview)
        return Prompt(torch.tensor(ids), torch.from_numpy(positions), len(ids) + delta, tuple(items))

    def _preview_layout(self, items: list[MediaItem]) -> PreviewLayout | None:
        """How Preview places media; None for the other generations. A video of unknown rate has a second a frame."""
        if self.config.tokens_per_second is None:
            return None
        seconds = [item.second_per_grid or 1.0 for item in items if item.kind == "video"]
        rates = {self.config.video_token_id: seconds}
        return PreviewLayout(self.config.vision_start_token_id, rates, self.config.tokens_per_second)


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
