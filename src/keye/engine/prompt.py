"""From a conversation to what the model computes: token ids, positions, patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keye.chat import ChatTemplate, CheckpointTemplate, Medium, Message, Segment, render
from keye.config import KeyeConfig
from keye.engine.kvcache import KVCache
from keye.engine.media import PlannedMedium, check_medium, plan_medium
from keye.errors import KeyeError, Option
from keye.media.fetch import Source
from keye.media.image import ImagePlan
from keye.media.inputs import open_frames
from keye.media.patches import VisionInput
from keye.media.plan import VideoPlan
from keye.media.positions import PreviewLayout, build_position_ids
from keye.media.processor import MediaItem, Piece, Processor, VisualSpan
from keye.tokenizer import Tokenizer


@dataclass(frozen=True)
class Room:
    """A context of `limit` tokens, of which `reply` are kept for what is generated."""

    limit: int
    reply: int

    def check(self, tokens: int, visual: int, *, at_least: bool = False) -> None:
        """`KeyeError` when a prompt of (at least) `tokens`, `visual` of them visual, does not fit; the sentence says
        what to change."""
        if tokens + self.reply > self.limit:
            taken = f"{'at least ' if at_least else ''}{tokens} tokens"
            seen = f", {visual} of them visual" if visual else ""
            raise KeyeError(
                f"the prompt takes {taken}{seen} and the reply up to {self.reply}, but the context holds {self.limit}; "
                "sample fewer or smaller frames ({}, {}, {}) or lower {}",
                *map(Option, ("fps", "max_frames", "max_pixels", "max_tokens")),
            )


@dataclass(frozen=True)
class Prompt:
    """`token_ids` int64 [T]; `position_ids` int64 [3, T]; `next_position` of the first generated token; the media.

    `past`, if given, holds the first tokens of the prompt, computed before (an index of a video): they and the media in
    them are not computed again. It stays as it is.
    """

    token_ids: Tensor
    position_ids: Tensor
    next_position: int
    media: tuple[MediaItem, ...]
    past: KVCache | None = None

    @property
    def media_tokens(self) -> int:
        return sum(item.visual_tokens for item in self.media)

    def vision(self) -> tuple[Tensor, Tensor] | None:
        """Patches and grids of all media in order, or None without media."""
        if not self.media:
            return None
        return VisionInput.concatenate([item.vision for item in self.media]).tensors()


@dataclass(frozen=True)
class Measured:
    """What a prompt costs, known before it is decoded. `media` are the plans, each with its `kind`."""

    prompt_tokens: int
    media_tokens: int
    media: tuple[Mapping[str, Any], ...]


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
        return self.lay_out(self.render(messages, template=template, thinking=thinking, tools=tools))

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        template: ChatTemplate | CheckpointTemplate | None = None,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """The prompt as text with its media in their places. Their options are checked; none is opened."""
        if isinstance(template, CheckpointTemplate):
            segments = template.render(messages, thinking=thinking, tools=tools)
        else:
            segments = render(messages, template=template, thinking=thinking, tools=tools)
        for segment in segments:
            if isinstance(segment.value, Medium):
                check_medium(segment.value)
        return segments

    def lay_out(self, segments: Sequence[Segment], *, room: Room | None = None) -> Prompt:
        """Opens and decodes the media of a rendered prompt, and gives every token its id and position.

        With `room`, a prompt too long for the context is refused before anything is decoded, as far as its length can
        be known by then, and in any case before it is returned.
        """
        media = [segment.value for segment in segments if isinstance(segment.value, Medium)]
        videos = sum(medium.kind == "video" for medium in media)
        planned = [plan_medium(medium, self.processor, videos) for medium in media]
        text = [self.tokenizer.encode_parts(run) for run in _text_runs(segments)]
        if room is not None:
            least = sum(len(self._piece_ids(medium.pieces)) for medium in planned) + sum(map(len, text))
            room.check(least, sum(medium.visual_tokens for medium in planned), at_least=True)
        items = [self._decode(medium) for medium in planned]
        ids = list(text[0])
        for item, after in zip(items, text[1:], strict=True):
            ids += self._piece_ids(item.pieces) + after
        prompt = self._positioned(ids, items)
        if room is not None:
            room.check(len(ids), prompt.media_tokens)
        return prompt

    def measure(self, segments: Sequence[Segment]) -> Measured:
        """What a rendered prompt costs, at least (see `PlannedMedium`). Videos are probed; lists of pictures, which
        have no plan, are opened and their sizes found."""
        media = [segment.value for segment in segments if isinstance(segment.value, Medium)]
        videos = sum(medium.kind == "video" for medium in media)
        plans, pieces = [], []
        for medium in media:
            planned = plan_medium(medium, self.processor, videos)
            if planned.plan is not None:
                plans.append({"kind": medium.kind, **planned.plan.to_dict()})
                pieces.append(planned.pieces)
                continue
            item = self._decode(planned)
            plans.append({"kind": medium.kind, **item.plan_dict()})
            pieces.append(item.pieces)
        text = sum(len(self.tokenizer.encode_parts(run)) for run in _text_runs(segments))
        tokens = sum(plan["visual_tokens"] for plan in plans)
        return Measured(text + sum(len(self._piece_ids(one)) for one in pieces), tokens, tuple(plans))

    def _decode(self, medium: PlannedMedium) -> MediaItem:
        if medium.kind == "image":
            plan = medium.plan if isinstance(medium.plan, ImagePlan) else None
            return self.processor.image(medium.source, medium.options, plan=plan)
        if isinstance(medium.source, Source):
            assert isinstance(medium.plan, VideoPlan)
            return self.processor.video(medium.source, medium.options, plan=medium.plan)
        return self.processor.frames(open_frames(medium.source), medium.options)

    def _piece_ids(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
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


def _text_runs(segments: Sequence[Segment]) -> list[list[tuple[str, bool]]]:
    """The texts before, between and after the media, each with whether the template wrote it."""
    runs: list[list[tuple[str, bool]]] = [[]]
    for segment in segments:
        if isinstance(segment.value, Medium):
            runs.append([])
        else:
            runs[-1].append((segment.value, segment.kind == "template"))
    return runs
