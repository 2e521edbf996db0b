"""Messages, or texts with media, to the inputs of the model."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from keye.chat.foreign_template import CheckpointTemplate, find_template
from keye.chat.messages import Medium
from keye.chat.template import ChatTemplate, Segment, template_of
from keye.chat.tokenizer import Tokenizer, check_tokenizer
from keye.compat.processor import VIDEO_PAD, OfficialProcessor
from keye.config import load_generation_config, load_model_config, load_processor_config
from keye.config.media import MediaOptions
from keye.engine.media import plan_medium
from keye.engine.prompt import Prompt, PromptBuilder
from keye.errors import KeyeError
from keye.hf.config import folder_of
from keye.media import sizes
from keye.media.pixels.patches import VisionInput, as_frames
from keye.media.positions import split_grid_rows
from keye.media.processor import MediaItem, Processor, VisualSpan

_PADS = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
_PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "config.json",
                    "generation_config.json", "chat_template.json", "chat_template.jinja")  # fmt: skip
#: Lists that `process_vision_info` returns beside the media, one entry for each video.
_FRAME_SETTINGS = ("height", "width", "fast_height", "fast_width", "frame_types", "timestamps")


class _Builder(PromptBuilder):
    """Also lays out texts whose media are `MediaItem`s already."""

    def lay_out_ready(self, segments: Sequence[Segment]) -> Prompt:
        """Texts, in which special tokens count, and media in their order."""
        ids: list[int] = []
        items: list[MediaItem] = []
        for segment in segments:
            if isinstance(segment.value, Medium):
                ready = segment.value.source
                if not isinstance(ready, MediaItem):
                    ready = self.processor.load(plan_medium(segment.value, self.processor))
                items.append(ready)
                ids += self.piece_ids(items[-1].pieces)
            else:
                ids += self.piece_ids((segment.value,))
        return self._positioned(ids, items)


class KeyeProcessor:
    """Messages, or texts with media, to the inputs of the model, by keye's own processor. Also for 1.5 and 2.0.

    `min_pixels` and `max_pixels` hold for every image and every frame that has no such option of its own.
    """

    model_input_names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw",
                         "pixel_values_videos", "video_grid_thw")  # fmt: skip

    def __init__(
        self, folder: Path, *, min_pixels: float | None = None, max_pixels: float | None = None,
        padding_side: str = "left",
    ) -> None:  # fmt: skip
        if padding_side not in ("left", "right"):
            raise KeyeError(f"padding_side is {padding_side!r}: give left or right.")
        MediaOptions(min_pixels=min_pixels, max_pixels=max_pixels)  # rejects what is not a limit
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._limits: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
        self.padding_side, self.folder = padding_side, folder
        config, defaults = load_model_config(folder), load_generation_config(folder)
        self._tokenizer = Tokenizer.from_file(folder)
        check_tokenizer(self._tokenizer, config)
        self.prompts = _Builder(config, self._tokenizer, Processor(load_processor_config(folder)))
        own = template_of(config.release, defaults.default_system)
        brought = find_template(folder)
        self._template: ChatTemplate | CheckpointTemplate = own
        if brought is not None:
            self._template = brought.for_model(own, defaults.default_system, fall_back=True)
        pads = (config.pad_token_id, *defaults.eos_token_ids, *config.eos_token_ids)
        self.pad_token_id = next((value for value in pads if value is not None), 0)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> KeyeProcessor:
        """Reads a folder, or a checkpoint by its name on the hub; takes the limits and `padding_side` of the class."""
        options.pop("config", None)
        own = {name: options.pop(name) for name in ("min_pixels", "max_pixels", "padding_side") if name in options}
        own = {name: value for name, value in own.items() if value is not None}
        return cls(folder_of(pretrained_model_name_or_path, options, weights=False), **own)

    def save_pretrained(self, save_directory: Any) -> None:
        """Copies the files that this processor was read from."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def apply_chat_template(
        self, conversation: Sequence[Any], *, tokenize: bool = False, add_generation_prompt: bool = False,
        enable_thinking: bool | None = None, tools: Sequence[Mapping[str, Any]] = (), return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> Any:  # fmt: skip
        """One conversation or a list of them as text, or with `tokenize` as inputs of the model.

        Only with `tokenize` do special tokens typed by a user stay plain text: a text no longer tells them apart.
        """
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        prompts = [
            self._template.render(messages, add_generation_prompt=add_generation_prompt, thinking=enable_thinking,
                                  tools=tools)
            for messages in (conversation if many else [conversation])
        ]  # fmt: skip
        if not tokenize:
            pads = {kind: token for token, kind in _PADS.items()}
            texts = ["".join(pads.get(part.kind) or str(part.value) for part in prompt) for prompt in prompts]
            return texts if many else texts[0]
        limited = [[self._limited(segment) for segment in prompt] for prompt in prompts]
        batch = self._batch([self.prompts.lay_out(prompt) for prompt in limited], return_tensors)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self, text: str | Sequence[str], images: Any = None, videos: Any = None, *, padding: bool = True,
        return_tensors: str = "pt", **settings: Any,
    ) -> Any:  # fmt: skip
        """Texts that hold `<|image_pad|>` and `<|video_pad|>` once for each medium, with the media in their order:
        paths, bytes, PIL images, or `keye.Frames`. Special tokens in the texts count.

        `settings` are what `process_vision_info` returns beside images and videos: lists with an entry for each video,
        which then are frames in memory. Preview: `fps`. 1.5: the sizes, `frame_types` and `timestamps`. 2.0, which has
        no fast frames, takes the times from them and no frame larger than `height` x `width`.
        """
        media: list[Any] = _listed(videos)
        if settings := {name: value for name, value in settings.items() if value is not None}:
            media = self._sampled_videos(media, settings)
        waiting = {"image": _listed(images), "video": media}
        laid_out = self.prompts.lay_out_ready if settings else self.prompts.lay_out
        prompts = [laid_out([self._limited(part) for part in _segments(item, waiting)]) for item in _listed(text)]
        if left := [kind for kind, rest in waiting.items() if rest]:
            raise KeyeError(f"there are more {left[0]}s than {left[0]} placeholders in the text.")
        if not padding and len({len(prompt.token_ids) for prompt in prompts}) > 1:
            raise KeyeError("texts of different length need padding=True.")
        return self._batch(prompts, return_tensors)

    def _limited(self, segment: Segment) -> Segment:
        """The segment, a medium in it under the limits of this processor."""
        medium = segment.value
        if not isinstance(medium, Medium) or not self._limits:
            return segment
        own = {name: value for name, value in medium.options.items() if value is not None}
        return dataclasses.replace(segment, value=dataclasses.replace(medium, options={**self._limits, **own}))

    def _sampled_videos(self, videos: Sequence[Any], settings: Mapping[str, Any]) -> list[MediaItem]:
        """Videos that the official utilities have sampled, by what these say of them."""
        config, count = self.prompts.processor.config, len(videos)
        if unknown := sorted(settings.keys() - {*_FRAME_SETTINGS, "fps"}):
            raise KeyeError(f"unknown option {', '.join(unknown)} of the processor; it takes what process_vision_info "
                            "returns.")  # fmt: skip
        if config.release.whole_video and (wrong := sorted(settings.keys() - {"fps"})):
            raise KeyeError(f"Preview has no {wrong[0]} of a video: take process_vision_info of utils_preview.")
        rows: list[dict[str, Any]] = [{} for _ in videos]
        for name, values in settings.items():
            each = [values] * count if name == "fps" and isinstance(values, int | float) else list(values)
            if len(each) != count:
                raise KeyeError(f"{name} has {len(each)} entries for {count} videos; give one for each video.")
            for row, value in zip(rows, each, strict=True):
                if value is not None:
                    row[name] = value.tolist() if hasattr(value, "tolist") else value
        return [self._sampled_video(video, row, count) for video, row in zip(videos, rows, strict=True)]

    def _sampled_video(self, video: Any, row: Mapping[str, Any], count: int) -> MediaItem:
        """One of `count` videos; `row` holds its own settings."""
        config = self.prompts.processor.config
        rate, times = row.get("fps"), row.get("timestamps")
        if not config.release.processor_is_published:
            return self._frames_of_2_0(video, row, count)
        known: dict[str, Any] = {name: [value] for name, value in row.items() if name in _FRAME_SETTINGS}
        seconds = None
        if config.release.whole_video:
            known["fps"] = config.fps if rate is None else rate
            seconds = 1 / known["fps"]
            limits: dict[str, Any] = {f"processor_{name}": int(value) for name, value in self._limits.items()}
            config = dataclasses.replace(config, **limits)
        output = OfficialProcessor(config)(VIDEO_PAD, videos=[video], **known)
        pixels, grid = output.pixel_values_videos, output.video_grid_thw
        assert pixels is not None and grid is not None
        if config.release.classifies_frames:
            grid = split_grid_rows(grid)  # the positions of 1.5 count frame by frame
        pieces = re.split(f"((?:{re.escape(VIDEO_PAD)})+)", output.text[0])
        spans = tuple(VisualSpan("video", count) if (count := piece.count(VIDEO_PAD)) else piece
                      for piece in pieces if piece)  # fmt: skip
        return MediaItem("video", VisionInput(pixels, grid), spans, tuple(times or ()), seconds)

    def _frames_of_2_0(self, video: Any, row: Mapping[str, Any], count: int) -> MediaItem:
        """By the sizes of the checkpoint; a frame larger than the utilities allow takes their size."""
        processor, frames, times = self.prompts.processor, as_frames(video), row.get("timestamps")
        if times is None and row.get("fps"):
            times = [index / row["fps"] for index in range(len(frames))]
        options = MediaOptions(**self._limits, timestamps=None if times is None else tuple(times))
        if times is not None:
            total = sizes.compute_total_pixels(
                processor.config, times[-1] - times[0], options.replace(video_count=count)
            )
            options = options.replace(video_total_pixels=total)
        if "height" in row and "width" in row:
            width, height = frames[0].size if isinstance(frames, list) else frames.shape[2:0:-1]
            own = sizes.compute_frame_sizes(height, width, len(frames), processor.config, options).slow
            if own[0] * own[1] > row["height"] * row["width"]:
                options = options.replace(resized_height=row["height"], resized_width=row["width"])
        return processor.frames(video, options)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True, **_: Any) -> str:
        """The text of one row of ids."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special=skip_special_tokens)

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool = True, **_: Any) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def _batch(self, prompts: Sequence[Prompt], return_tensors: str) -> Any:
        """Rows padded at `padding_side`, and the media of all of them."""
        if return_tensors != "pt":
            raise KeyeError(f"return_tensors is {return_tensors!r}: only 'pt' is supported.")
        length = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.pad_token_id)
        mask, positions = torch.zeros_like(ids), torch.ones(3, len(prompts), length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            start = length - len(prompt.token_ids) if self.padding_side == "left" else 0
            own = slice(start, start + len(prompt.token_ids))
            ids[row, own], mask[row, own], positions[:, row, own] = prompt.token_ids, 1, prompt.position_ids
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for kind, pixels, grid in (("image", "pixel_values", "image_grid_thw"),
                                   ("video", "pixel_values_videos", "video_grid_thw")):  # fmt: skip
            items = [item.vision for prompt in prompts for item in prompt.media if item.kind == kind]
            if items:
                batch[pixels], batch[grid] = VisionInput.concatenate(items).tensors()
        return transformers.BatchFeature(batch)


class KeyeVL1_5Processor(KeyeProcessor):
    """1.5."""


class KeyeVL2Processor(KeyeProcessor):
    """2.0 and keye-nano."""


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _segments(text: str, waiting: Mapping[str, list[Any]]) -> Iterator[Segment]:
    """A text cut at its placeholders, each with the next medium of its kind."""
    rest = text
    while places := [(rest.index(token), token) for token in _PADS if token in rest]:
        at, token = min(places)
        kind = _PADS[token]
        if not waiting[kind]:
            raise KeyeError(f"the text has more {kind} placeholders than there are {kind}s.")
        yield Segment("template", rest[:at])
        yield Segment(kind, Medium(kind, waiting[kind].pop(0)))  # type: ignore[arg-type]
        rest = rest[at + len(token) :]
    yield Segment("template", rest)
