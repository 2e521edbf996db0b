"""Samples as a model reads them: token ids, positions and labels, laid out by the code that lays out prompts for
inference. Every learnt turn is the prompt that inference would have had for it, and the reply that it was to give."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import numpy as np

from keye.api import choose_template
from keye.chat.messages import Medium, Message
from keye.chat.template import ChatTemplate, Segment, template_of
from keye.chat.tokenizer import Tokenizer, check_tokenizer
from keye.config import load_generation_config, load_model_config, load_processor_config
from keye.data.samples import Sample
from keye.engine.prompt import ContextBudget, Prompt, PromptBuilder
from keye.errors import KeyeError, KeyeWarning, Option
from keye.media.processor import Decoder, MediaItem, Processor
from keye.train.tree import IGNORE, Path, Tree

if TYPE_CHECKING:
    from keye.chat.foreign_template import CheckpointTemplate

#: How the modes of samples switch reasoning; every other mode leaves it to the model.
_THINKING = {"think": True, "no_think": False}
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_TEXT_END = "<|endoftext|>"
#: Frames of a video that stay in memory between their classification (1.5) and the time its pack is loaded: the samples
#: of a step are laid out together.
NATIVE_BYTES = 8 << 20


class LengthError(KeyeError):
    """A sample that is longer than a pack may be. Nothing is cut: media would lose their tokens."""


@dataclass(frozen=True)
class LaidOut:
    """A sample as paths of one tree: its learnt turns, and the reply that lost where it has one.

    `length` counts the tokens of the tree, `visual_tokens` the visual ones among them. Media are planned; the pixels
    of videos are not decoded yet. `notes` are sentences about options of media that were not honoured.
    """

    sample: Sample
    paths: tuple[Path, ...]
    length: int
    visual_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def learnt(self) -> int:
        """Labels of all paths."""
        return sum(int((path.labels != IGNORE).sum()) for path in self.paths)


@dataclass(frozen=True)
class _TrainBudget(ContextBudget):
    place: str = ""

    def check(self, tokens: int, visual: int, *, at_least: bool = False) -> None:
        if tokens > self.limit:
            raise length_error(self.place, tokens, visual, self.limit, at_least=at_least)


def length_error(place: object, tokens: int, visual: int, limit: int, *, at_least: bool = False) -> LengthError:
    """The error of a sample of (at least) `tokens`, `visual` of them visual, where `limit` are allowed."""
    least = "at least " if at_least else ""
    return LengthError(
        f"{place}: the sample takes {least}{tokens:,} tokens, {visual:,} of them visual, but {{}} is {limit:,}: raise "
        "it, sample fewer or smaller frames ({}, {}, {}), or drop long samples",
        *map(Option, ("max_length", "fps", "max_frames", "max_pixels")),
    )  # fmt: skip


class Layout:
    """Lays out samples for one model, whose prompts follow `template` and whose replies end with one of the tokens
    `ends`. Samples of more than `max_tokens` are a `LengthError`, before anything of them is decoded where their length
    is known by then."""

    def __init__(
        self, builder: PromptBuilder, template: ChatTemplate | CheckpointTemplate, *, ends: Sequence[int] = (),
        max_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.builder, self.template, self.max_tokens = builder, template, max_tokens
        self.ends = frozenset(ends or builder.config.eos_token_ids)
        self._notes: list[str] = []

    @classmethod
    def of_folder(
        cls,
        folder: FilePath,
        *,
        template: str | FilePath = "auto",
        max_tokens: int | None = None,
        decoder: Decoder | None = None,
    ) -> Layout:
        """The layout of the model in a folder, of which no weights are read; the arguments are those of `keye.load`."""
        config, defaults = load_model_config(folder), load_generation_config(folder)
        tokenizer = Tokenizer.from_file(folder)
        check_tokenizer(tokenizer, config)
        own = template_of(config.release, defaults.default_system)
        chosen = choose_template(template, folder, config.release)
        processor = Processor(load_processor_config(folder), decoder=decoder, native_bytes=NATIVE_BYTES)
        builder = PromptBuilder(config, tokenizer, processor)
        return cls(
            builder, own if chosen is None else chosen.for_model(own, defaults.default_system),
            ends=defaults.eos_token_ids or config.eos_token_ids, max_tokens=max_tokens,
        )  # fmt: skip

    def lay_out(self, sample: Sample) -> LaidOut:
        """Token ids, positions and labels of a sample. `KeyeError` with its place where it cannot be learnt."""
        self._notes.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KeyeWarning)  # not a line for each sample and epoch
                paths = self._plain(sample) if sample.plain else self._turns(sample)
        except LengthError:
            raise
        except KeyeError as error:
            raise type(error)(f"{sample.place}: {{}}", str(error)) from error
        laid_out = plant(sample, paths)
        if self.max_tokens is not None and laid_out.length > self.max_tokens:
            raise length_error(sample.place, laid_out.length, laid_out.visual_tokens, self.max_tokens)
        return replace(laid_out, notes=tuple(dict.fromkeys(self._notes)))

    def _turns(self, sample: Sample) -> list[Path]:
        """A path for each learnt turn, but those whose turns go on as the next prompt begins, which share one."""
        last = len(sample.messages) - 1
        turns = [index for index, learn in enumerate(sample.learn) if learn]
        paths = self._conversation(sample, sample.messages, turns)
        if sample.rejected:
            messages = (*sample.messages[:last], *sample.rejected)
            turns = [index for index in range(last, len(messages)) if messages[index].role == "assistant"]
            media = paths[-1].media if paths else ()
            lost = self._conversation(sample, messages, turns, media)
            paths += [replace(path, rejected=True) for path in lost]
        if not paths:
            raise KeyeError("nothing of it is learnt: it needs a message of the assistant")
        return paths

    def _conversation(
        self, sample: Sample, messages: Sequence[Message], turns: Sequence[int], media: Sequence[MediaItem] = ()
    ) -> list[Path]:
        paths: list[Path] = []
        for index in reversed(turns):  # the last prompt has the media of all
            segments, reply = self._render(sample, messages[: index + 1])
            path = reply_path(self._lay_out(sample, segments, paths[-1].media if paths else media), reply)
            if paths and _begins(paths[-1], path):
                learnt = path.labels != IGNORE
                paths[-1].labels[: len(path.labels)][learnt] = path.labels[learnt]
            else:
                paths.append(path)
        return paths[::-1]

    def _render(self, sample: Sample, messages: Sequence[Message]) -> tuple[list[Segment], list[int]]:
        """The prompt before the last message, and the token ids of that message up to its end."""
        *before, message = messages
        if message.role != "assistant" or not before:
            raise KeyeError(f"message {len(before) + 1} is learnt: it must be the assistant's, after one of the user")
        thinking, render = _THINKING.get(sample.mode or ""), self.builder.render
        prompt = render(before, template=self.template, thinking=thinking, tools=sample.tools)
        rendered = render(
            messages, template=self.template, thinking=thinking, tools=sample.tools, add_generation_prompt=False
        )
        reply = _remove_beginning(rendered, prompt)
        if reply is None and thinking is False:  # the prompt has closed the block of reasoning, the reply has none
            reply = _remove_beginning(rendered, _without_block(prompt))
        if reply is None:
            raise KeyeError(f"message {len(before) + 1} does not go on as its prompt begins it: a reply of mode "
                            f"{sample.mode} starts with <think>" if thinking else
                            f"message {len(before) + 1} cannot be learnt: the chat template writes it otherwise than "
                            "its prompt begins it")  # fmt: skip
        if any(isinstance(segment.value, Medium) for segment in reply):
            raise KeyeError(f"message {len(before) + 1} is learnt and has a medium, which no reply can have")
        ids = self.builder.tokenizer.encode_parts((str(s.value), s.kind == "template") for s in reply)
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        if end is None:
            raise KeyeError("the chat template writes no token that ends a reply")
        return prompt, ids[: end + 1]

    def _lay_out(self, sample: Sample, segments: Sequence[Segment], media: Sequence[MediaItem] = ()) -> Prompt:
        limit = self.max_tokens or self.builder.config.text.max_position_embeddings
        budget = _TrainBudget(limit, 0, str(sample.place))
        opened = [segment.value for segment in segments if isinstance(segment.value, Medium)]
        same = len(opened) == len(media)  # with fewer media, those that are left may have a larger share
        prompt = self.builder.lay_out(segments, budget=budget, stream=True, media=media if same else None)
        self._notes += map(str, prompt.notes)
        return prompt

    def _plain(self, sample: Sample) -> list[Path]:
        """Texts and media as they stand, then the end of a text; what is learnt are the texts of learnt messages."""
        segments, learnt = list[Segment](), list[bool]()
        for message, learn in zip(sample.messages, sample.learn, strict=True):
            for part in message.parts:
                parts = [Segment("text", part)] if isinstance(part, str) else _marked(part)
                segments, learnt = segments + parts, learnt + [learn and isinstance(part, str)] * len(parts)
        if sample.learn[-1]:
            segments, learnt = [*segments, Segment("template", self._text_end)], [*learnt, True]
        opened = self._lay_out(sample, segments).media
        media, ids, mask = iter(opened), list[int](), list[bool]()
        for segment, learn in zip(segments, learnt, strict=True):
            if isinstance(segment.value, Medium):
                new = self.builder.piece_ids(next(media).pieces)
            else:
                new = self.builder.tokenizer.encode(segment.value, special=segment.kind == "template")
            ids, mask = ids + new, mask + [learn] * len(new)
        if not any(mask[1:]):
            raise KeyeError("nothing of it is learnt: it needs a text that is")
        prompt = self.builder.of_tokens(ids, opened, reply=0)
        tokens = prompt.token_ids.numpy()
        labels = np.append(np.where(mask[1:], tokens[1:], IGNORE), IGNORE)
        return [Path(tokens, prompt.position_ids.numpy(), labels, prompt.is_visual.numpy(), opened)]

    @cached_property
    def _text_end(self) -> str:
        """The token that ends a plain text."""
        tokenizer = self.builder.tokenizer
        return (
            _TEXT_END if _TEXT_END in tokenizer.added_tokens else tokenizer.decode([min(self.ends)], skip_special=False)
        )


def plant(sample: Sample, paths: Sequence[Path]) -> LaidOut:
    """A sample as the tree of its paths."""
    tree = Tree()
    for path in paths:
        tree.add(path, 0)
    visual = sum(int(b.path.is_visual[b.start : b.stop].sum()) for b, _ in tree.branches())
    return LaidOut(sample, tuple(paths), tree.length, visual)


def reply_path(prompt: Prompt, reply: Sequence[int]) -> Path:
    """A prompt and the token ids of a reply to it, its end among them, which are learnt."""
    length, learnt = prompt.length, len(reply)
    labels = np.full(length + learnt, IGNORE, np.int64)
    labels[length - 1 : -1] = reply
    after = prompt.next_position + np.arange(learnt)
    return Path(
        np.concatenate([prompt.token_ids.numpy(), np.array(reply, np.int64)]),
        np.concatenate([prompt.position_ids.numpy(), np.broadcast_to(after, (3, learnt))], axis=1),
        labels, np.concatenate([prompt.is_visual.numpy(), np.zeros(learnt, bool)]), prompt.media,
    )  # fmt: skip


def _begins(path: Path, earlier: Path) -> bool:
    """Whether a path begins with another, to its end."""
    length = len(earlier.token_ids)
    return len(path.token_ids) >= length and bool((path.contents[:length] == earlier.contents).all())


def _marked(medium: Medium) -> list[Segment]:
    mark = "<|vision_start|>", "<|vision_end|>"
    return [Segment("template", mark[0]), Segment(medium.kind, medium), Segment("template", mark[1])]


def _without_block(segments: Sequence[Segment]) -> list[Segment]:
    """A prompt without the closed block of reasoning at its end."""
    *before, last = segments
    return [*before, Segment(last.kind, str(last.value).removesuffix(_NO_THOUGHT))]


def _remove_beginning(segments: Sequence[Segment], beginning: Sequence[Segment]) -> list[Segment] | None:
    """What follows in `segments` on the texts and media of `beginning`; None where they begin otherwise."""
    rest = list(segments)
    for segment in beginning:
        if isinstance(segment.value, Medium):
            if not rest or rest.pop(0).value is not segment.value:
                return None
            continue
        text = segment.value
        while text:
            if not rest or isinstance(rest[0].value, Medium):
                return None
            kind, first = rest[0].kind, rest.pop(0).value
            assert isinstance(first, str)
            both = min(len(text), len(first))
            if first[:both] != text[:both]:
                return None
            text = text[both:]
            if first[both:]:
                rest.insert(0, Segment(kind, first[both:]))
    return rest
