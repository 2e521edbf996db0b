"""Messages, or texts with media, to the inputs of the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from keye.chat import Medium, Segment, render, template_of
from keye.config import load_generation_config, load_model_config, load_processor_config
from keye.engine.prompt import Prompt, PromptBuilder
from keye.errors import KeyeError
from keye.hf.config import folder_of
from keye.media.patches import VisionInput
from keye.media.processor import Processor
from keye.tokenizer import Tokenizer, check_tokenizer

_PADS = {"<|image_pad|>": "image", "<|video_pad|>": "video"}
_PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "config.json",
                    "generation_config.json", "chat_template.json", "chat_template.jinja")  # fmt: skip


class KeyeProcessor:
    """Messages, or texts with media, to the inputs of the model, by keye's own processor. Also for 1.5 and 2.0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config, generation = load_model_config(folder), load_generation_config(folder)
        self._tokenizer = Tokenizer.from_file(folder)
        check_tokenizer(self._tokenizer, config)
        self._builder = PromptBuilder(config, self._tokenizer, Processor(load_processor_config(folder)))
        self._template = template_of(config.architecture, generation.default_system)
        pads = (config.pad_token_id, *generation.eos_token_ids, *config.eos_token_ids)
        self.pad_token_id = next((value for value in pads if value is not None), 0)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> KeyeProcessor:
        """Reads a folder, or a checkpoint by its name on the hub. Unknown options are errors."""
        options.pop("config", None)
        return cls(folder_of(pretrained_model_name_or_path, options, weights=False))

    def save_pretrained(self, save_directory: Any) -> None:
        """Copies the files that this processor was read from."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _PROCESSOR_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> Any:
        """One conversation or a list of them as text, or with `tokenize` as inputs of the model.

        Only with `tokenize` do special tokens typed by a user stay plain text: a text no longer tells them apart.
        """
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        prompts = [
            render(messages, template=self._template, add_generation_prompt=add_generation_prompt,
                   thinking=enable_thinking, tools=tools)
            for messages in (conversation if many else [conversation])
        ]  # fmt: skip
        if not tokenize:
            pads = {kind: token for token, kind in _PADS.items()}
            texts = ["".join(pads.get(part.kind) or str(part.value) for part in prompt) for prompt in prompts]
            return texts if many else texts[0]
        batch = self._batch([self._builder.lay_out(prompt) for prompt in prompts], return_tensors)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        padding: bool = True,
        return_tensors: str = "pt",
    ) -> Any:
        """Texts that hold `<|image_pad|>` and `<|video_pad|>` once for each medium, with the media in their order:
        paths, bytes, PIL images, or `keye.Frames`. Special tokens in the texts count; rows are padded at the left."""
        waiting = {"image": _listed(images), "video": _listed(videos)}
        prompts = [self._builder.lay_out(list(_segments(one, waiting))) for one in _listed(text)]
        if left := [kind for kind, media in waiting.items() if media]:
            raise KeyeError(f"there are more {left[0]}s than {left[0]} placeholders in the text.")
        if not padding and len({len(prompt.token_ids) for prompt in prompts}) > 1:
            raise KeyeError("texts of different length need padding=True.")
        return self._batch(prompts, return_tensors)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True, **_: Any) -> str:
        """The text of one row of ids."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special=skip_special_tokens)

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool = True, **_: Any) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def _batch(self, prompts: Sequence[Prompt], return_tensors: str) -> Any:
        """Rows padded at the left, and the media of all of them."""
        if return_tensors != "pt":
            raise KeyeError(f"return_tensors is {return_tensors!r}: only 'pt' is supported.")
        length = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), length), self.pad_token_id)
        mask, positions = torch.zeros_like(ids), torch.ones(3, len(prompts), length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            start = length - len(prompt.token_ids)
            ids[row, start:], mask[row, start:], positions[:, row, start:] = prompt.token_ids, 1, prompt.position_ids
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
