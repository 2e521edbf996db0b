"""From a conversation to what the model computes: token ids, positions, patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from keye.cache.prefix import MediaSpans
from keye.cache.sequence import KVCache
from keye.chat.messages import Medium, Message
from keye.chat.replies import Window, collect_windows
from keye.chat.template import CHATML, ChatTemplate, Segment, drop_last_end
from keye.chat.tokenizer import Tokenizer
from keye.config import KeyeConfig
from keye.engine.media import Frames, OpenIndex, VideoIndex, check_medium, plan_medium
from keye.errors import ContextError, KeyeError, KeyeWarning, Option, collect_warnings
from keye.media.pixels.patches import VisionInput
from keye.media.positions import PreviewLayout, build_position_ids
from keye.media.processor import MediaItem, Piece, PlannedMedium, Processor, VisualSpan
from keye.models.keye import visual_mask

if TYPE_CHECKING:
    from keye.chat.foreign_template import CheckpointTemplate

#: Tokens of a text that are counted without a context to hold them.
MOST_COUNTED = 2**20


@dataclass(frozen=True)
class ContextBudget:
    """A context of `limit` tokens, of which `reply` are kept for what is generated."""

    limit: int
    reply: int

    def check(self, tokens: int, visual: int, *, at_least: bool = False) -> None:
        """`KeyeError` when a prompt of (at least) `tokens`, `visual` of them visual, does not fit; the sentence says
        what to change."""
        if tokens + self.reply > self.limit:
            length = f"{'at least ' if at_least else ''}{tokens} tokens"
            seen = f", {visual} of them visual" if visual else ""
            raise ContextError(
                f"the prompt is too long: it takes {length}{seen} and the reply up to {self.reply}, but the context "
                f"holds {self.limit}; "
                "sample fewer or smaller frames ({}, {}, {}) or lower {}",
                *map(Option, ("fps", "max_frames", "max_pixels", "max_tokens")),
            )


@dataclass(frozen=True)
class Prompt:
    """`token_ids` int64 [T]; `position_ids` int64 [3, T]; `is_visual` bool [T], the placeholders of visual tokens;
    `next_position` of the first generated token; the media.

    `past`, if given, holds the first tokens of the prompt, computed before: they and the media in them are not computed
    again, and `media` are those after it. It stays as it is. `indexed` is the video in it where it is an index of one.
    `notes` are the warnings given while the media were planned, `windows` the seconds in which videos were sampled.
    """

    token_ids: Tensor
    position_ids: Tensor
    is_visual: Tensor
    next_position: int
    media: tuple[MediaItem, ...]
    past: KVCache | None = None
    indexed: VideoIndex | None = None
    notes: tuple[KeyeWarning, ...] = ()
    windows: tuple[Window, ...] = ()

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    @cached_property
    def visual_counts(self) -> Tensor:
        """How many visual tokens of `media` stand at or before each position, int64 [T]; 0 or less within the past."""
        counts = self.is_visual.cumsum(0)
        return counts if self.past is None or not self.past.length(0) else counts - counts[self.past.length(0) - 1]

    @cached_property
    def spans(self) -> MediaSpans | None:
        """Where the media are, for the prefix cache; None where a medium has no content key, and after a
        `past`, which is stored already."""
        if self.past is not None or any(item.key is None for item in self.media):
            return None
        places, spans, count = self.is_visual.nonzero().squeeze(1).tolist(), [], 0
        for item in self.media:
            spans.append((places[count], places[count + item.visual_tokens - 1] + 1, item.key or b""))
            count += item.visual_tokens
        return tuple(spans)

    @property
    def media_tokens(self) -> int:
        """Visual tokens that have to be encoded."""
        return sum(item.visual_tokens for item in self.media)

    @property
    def visual_tokens(self) -> int:
        """All visual tokens, those of an index among them."""
        return self.media_tokens + (0 if self.indexed is None else self.indexed.visual_tokens)

    @property
    def plans(self) -> tuple[Mapping[str, Any], ...]:
        """What was sampled of each medium and what it cost, as plain data."""
        indexed = () if self.indexed is None else (self.indexed.plan,)
        return (*indexed, *map(describe_item, self.media))

    def vision(self) -> tuple[Tensor, Tensor] | None:
        """Patches and grids of all media to be encoded, in order; None without any."""
        if not self.media:
            return None
        return VisionInput.concatenate([item.vision for item in self.media]).tensors()


def describe_item(item: MediaItem) -> dict[str, Any]:
    """The plan of a medium; frames in memory were not sampled, so theirs is what they are."""
    if item.plan is not None:
        return item.plan.to_dict()
    return {"frames": item.frame_count, "timestamps": list(item.timestamps), "visual_tokens": item.visual_tokens}


@dataclass(frozen=True)
class PromptCost:
    """What a prompt costs, known before it is decoded. `media` are the plans, each with its `kind`."""

    prompt_tokens: int
    media_tokens: int
    media: tuple[Mapping[str, Any], ...]


class PromptBuilder:
    """Builds prompts for one model. `open_index` opens indexes of videos for it; without, they are refused."""

    def __init__(
        self, config: KeyeConfig, tokenizer: Tokenizer, processor: Processor, open_index: OpenIndex | None = None
    ) -> None:
        self.config, self.tokenizer, self.processor, self.open_index = config, tokenizer, processor, open_index
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
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[Segment]:
        """The prompt as text with its media in their places. Their options are checked; none is opened."""
        begins = add_generation_prompt and not continue_final_message
        segments = (template or CHATML).render(messages, thinking=thinking, tools=tools, add_generation_prompt=begins)
        if continue_final_message:
            segments = drop_last_end(messages, segments)
        for segment in segments:
            if isinstance(segment.value, Medium):
                self._check_vision()
                check_medium(segment.value)
        return segments

    def _check_vision(self) -> None:
        """`KeyeError` where media come to a model without a vision part."""
        if not self.config.has_vision:
            raise KeyeError("this model was loaded without its vision part and reads text alone: load it with its {} "
                            "file, or leave the media out", Option("mmproj"))  # fmt: skip

    def encode_around(
        self, question: str, *, template: ChatTemplate | CheckpointTemplate | None = None, thinking: bool | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids before one video, and those after it with a question about it."""
        medium = Medium("video", Frames(()))
        segments = self.render([Message("user", (medium, question))], template=template, thinking=thinking)
        place = next(i for i, segment in enumerate(segments) if segment.value is medium)
        head, tail = (
            self.tokenizer.encode_parts((str(s.value), s.kind == "template") for s in part)
            for part in (segments[:place], segments[place + 1 :])
        )
        return head, tail

    def lay_out(
        self,
        segments: Sequence[Segment],
        *,
        budget: ContextBudget | None = None,
        stream: bool = False,
        salt: bytes = b"",
        media: Sequence[MediaItem] | None = None,
    ) -> Prompt:
        """Opens and decodes the media of a rendered prompt, and gives every token its id and position; `media` are its
        media where they were opened before.

        With `stream`, videos are not decoded yet: their items give pixels as they come, and every item has the key of
        its content, under `salt`: what one owner's media are called says nothing of another's.
        With `budget`, a prompt too long for the context is refused before anything is decoded, as far as its length can
        be known by then, and in any case before it is returned.
        """
        with collect_warnings() as notes:
            prompt = self._lay_out(segments, budget, stream, salt, media)
        return replace(prompt, notes=tuple(notes), windows=self._windows(prompt))

    def _lay_out(
        self, segments: Sequence[Segment], budget: ContextBudget | None, stream: bool, salt: bytes,
        opened: Sequence[MediaItem] | None,
    ) -> Prompt:  # fmt: skip
        media = [segment.value for segment in segments if isinstance(segment.value, Medium)]
        videos = sum(medium.kind == "video" for medium in media)
        runs = _split_runs(segments)
        if budget is not None:
            budget.check(sum(self.tokenizer.least_tokens(text) for run in runs for text, _ in run), 0, at_least=True)
        planned, visual = list[PlannedMedium](), 0
        for medium in media if opened is None else ():
            planned.append(plan_medium(medium, self.processor, videos, self.open_index, salt))
            visual += planned[-1].visual_tokens
            if budget is not None:
                budget.check(visual, visual, at_least=True)  # before the next one is opened
        text = self._encode_runs(runs, planned if opened is None else opened, budget)
        indexed, ids = _find_index(planned), list(text[0])
        if indexed is not None:
            if indexed.token_ids[: len(ids)].tolist() != ids or indexed.start != len(ids):
                raise KeyeError(f"{indexed.name} was indexed with another text before the video: leave out system "
                                "messages, tools and other templates, or index the video again with them")  # fmt: skip
            ids, text, planned = [*indexed.token_ids.tolist(), *text[1]], text[1:], planned[1:]
        items = list(opened or ())
        items += [self.processor.stream(each, salt) if stream else self.processor.load(each) for each in planned]
        for item, after in zip(items, text[1:], strict=True):
            ids += self.piece_ids(item.pieces) + after
        prompt = self._positioned(ids, items, indexed)
        if budget is not None:
            budget.check(len(ids), prompt.visual_tokens)
        return prompt

    def open(self, medium: Medium, *, videos: int = 1, budget: ContextBudget | None = None) -> MediaItem:
        """A medium with its pixels, one of `videos` in its prompt, for engines that lay out prompts themselves (with
        `piece_ids`). `ContextError` for one that does not fit `budget` by itself; where its size can be planned, before
        anything of it is decoded."""
        self._check_vision()
        planned = plan_medium(medium, self.processor, videos, self.open_index)
        if budget is not None:
            budget.check(len(self.piece_ids(planned.pieces)), planned.visual_tokens, at_least=True)
        item = self.processor.load(planned)
        if budget is not None:
            budget.check(len(self.piece_ids(item.pieces)), item.visual_tokens)
        return item

    def of_tokens(self, ids: Sequence[int], media: Sequence[MediaItem] = (), *, reply: int = 1) -> Prompt:
        """A prompt by token ids, with the `media` that stand at its placeholders, in order. `KeyeError` for ids that
        the model does not have or that are not whole numbers, and for placeholders of another number than the media
        have visual tokens; `ContextError` where the context does not hold them and `reply` more tokens."""
        if not len(ids):
            raise KeyeError("the prompt has no tokens; give at least one")
        visual = sum(item.visual_tokens for item in media)
        ContextBudget(self.config.text.max_position_embeddings, reply).check(len(ids), visual)
        try:
            ids = [index(token) for token in ids]
        except TypeError:
            raise KeyeError("the prompt has a token that is not a whole number; give token ids") from None
        if min(ids) < 0 or max(ids) >= self.config.text.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < self.config.text.vocab_size)
            raise KeyeError(f"the prompt has the token {wrong}; this model has {self.config.text.vocab_size:,}")
        expected = [self._pad[item.kind] for item in media for _ in range(item.visual_tokens)]
        if not media and not set(self._pad.values()).isdisjoint(ids):
            raise KeyeError("the prompt has tokens that stand for media; give text and the media themselves")
        if media and [token for token in ids if token in self._pad.values()] != expected:
            raise KeyeError(f"the prompt's placeholders are not those of its media, which have {visual} visual tokens; "
                            "write one of the medium's kind for each, in the order of the media")  # fmt: skip
        return self._positioned(list(ids), list(media))

    def extend(self, past: VideoIndex, ids: Sequence[int], media: Sequence[MediaItem] = ()) -> Prompt:
        """The prompt of a stored sequence and the token ids behind it, with the media at their placeholders."""
        prompt = self._positioned([*past.token_ids.tolist(), *ids], list(media), past)
        return replace(prompt, windows=self._windows(prompt))

    def _windows(self, prompt: Prompt) -> tuple[Window, ...]:
        return collect_windows(prompt.plans, relative=self.config.tokens_per_second is not None)

    def measure(self, segments: Sequence[Segment], salt: bytes = b"") -> PromptCost:
        """What a rendered prompt costs, at least (see `PlannedMedium`). Videos are probed; lists of pictures, which
        have no plan, are opened and their sizes found."""
        media = [segment.value for segment in segments if isinstance(segment.value, Medium)]
        videos = sum(medium.kind == "video" for medium in media)
        plans, pieces = [], []
        for medium in media:
            planned = plan_medium(medium, self.processor, videos, self.open_index, salt)
            if planned.plan is not None:
                plan, parts = planned.plan.to_dict(), planned.pieces
            elif isinstance(planned.source, VideoIndex):
                plan, parts = dict(planned.source.plan), planned.pieces
            else:
                visual, limit = planned.visual_tokens, self.config.text.max_position_embeddings
                ContextBudget(limit, 0).check(visual, visual, at_least=True)
                item = self.processor.load(planned)
                plan, parts = describe_item(item), item.pieces
            plans.append({"kind": medium.kind, **plan})
            pieces.append(parts)
        text = 0
        for run in _split_runs(segments):
            text += len(self.tokenizer.encode_parts(run, most=MOST_COUNTED))
            if text > MOST_COUNTED:
                raise KeyeError(f"the prompt has more than {MOST_COUNTED:,} tokens of text, which are not counted")
        tokens = sum(plan["visual_tokens"] for plan in plans)
        return PromptCost(text + tokens + sum(map(self._count_label_tokens, pieces)), tokens, tuple(plans))

    def _encode_runs(
        self,
        runs: Sequence[Sequence[tuple[str, bool]]],
        planned: Sequence[PlannedMedium | MediaItem],
        budget: ContextBudget | None,
    ) -> list[list[int]]:
        """The ids of the texts around media; with `budget`, `KeyeError` as soon as it is known that they do not fit."""
        if budget is None:
            return [self.tokenizer.encode_parts(run) for run in runs]
        visual = sum(medium.visual_tokens for medium in planned)
        used, ids = visual + sum(self._count_label_tokens(medium.pieces) for medium in planned), list[list[int]]()
        budget.check(used, visual, at_least=True)
        for run in runs:
            ids.append(self.tokenizer.encode_parts(run, most=max(budget.limit - budget.reply - used, 0)))
            used += len(ids[-1])
            budget.check(used, visual, at_least=True)
        return ids

    def _count_label_tokens(self, pieces: Sequence[Piece]) -> int:
        """Tokens of the texts among the pieces of a medium."""
        return sum(len(self.tokenizer.encode(piece, special=True)) for piece in pieces if isinstance(piece, str))

    def piece_ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of what stands for a medium."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, VisualSpan):
                ids += [self._pad[piece.kind]] * piece.tokens
            else:
                ids += self.tokenizer.encode(piece, special=True)
        return ids

    def _positioned(self, ids: list[int], items: list[MediaItem], indexed: VideoIndex | None = None) -> Prompt:
        grids = {}
        for kind in ("image", "video"):
            rows = [item.grid_thw for item in items if item.kind == kind]
            if rows:
                grids[self._pad[kind]] = np.concatenate(rows)
        merge, preview = self.config.vision.spatial_merge_size, None
        if self.config.tokens_per_second is not None:  # a video of unknown rate has a second a frame
            rates = {self._pad["video"]: [item.second_per_grid or 1.0 for item in items if item.kind == "video"]}
            preview = PreviewLayout(self.config.vision_start_token_id, rates, self.config.tokens_per_second)
        new = ids if indexed is None else ids[len(indexed.token_ids) :]
        array, delta = build_position_ids(new, grids, merge_size=merge, preview=preview)
        if not self.config.text.uses_mrope:  # the grids fit, and every token counts one position
            array, delta = np.broadcast_to(np.arange(len(new)), array.shape).copy(), 0
        positions, next_position = torch.from_numpy(array), len(new) + delta
        token_ids = torch.tensor(ids)
        is_visual = visual_mask(self.config, token_ids)
        if indexed is None:
            return Prompt(token_ids, positions, is_visual, next_position, tuple(items))
        first = indexed.next_position  # positions of what follows do not depend on where it begins
        positions = torch.cat((indexed.position_ids, positions + first), dim=1)
        return Prompt(token_ids, positions, is_visual, first + next_position, tuple(items), indexed.cache, indexed)


def _find_index(planned: Sequence[PlannedMedium]) -> VideoIndex | None:
    """The index that a prompt begins with. `KeyeError` for one at another place."""
    indexes = [medium.source for medium in planned if isinstance(medium.source, VideoIndex)]
    if not indexes:
        return None
    if len(indexes) > 1 or planned[0].source is not indexes[0]:
        raise KeyeError(f"{indexes[-1].name} is an index, which can only be the first medium of a prompt: put it "
                        "before the others, or give the video itself")  # fmt: skip
    return indexes[0]


def _split_runs(segments: Sequence[Segment]) -> list[list[tuple[str, bool]]]:
    """The texts before, between and after the media, each with whether the template wrote it."""
    runs: list[list[tuple[str, bool]]] = [[]]
    for segment in segments:
        if isinstance(segment.value, Medium):
            runs.append([])
        else:
            runs[-1].append((segment.value, segment.kind == "template"))
    return runs
