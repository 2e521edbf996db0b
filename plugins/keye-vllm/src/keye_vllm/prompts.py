"""Conversations to prompts as keye writes them: by the checkpoint's own chat template where it brings one and else by
that of keye, with special tokens that a user types as plain text, and options of media beside each of them
(`preprocess_kwargs`).

vLLM chooses this by the tokenizer mode `keye`, which is the default for these models. A chat template that is asked for
(`--chat-template`, or `chat_template` of a request) is used instead, as vLLM does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams

from keye import KeyeError
from keye.spi import (
    ChatTemplate,
    CheckpointTemplate,
    Medium,
    MediumKind,
    Segment,
    Tokenizer,
    check_tokenizer,
    find_template,
    load_generation_config,
    normalize,
    resolve,
    template_of,
)
from keye_vllm.media import as_medium

_KINDS: dict[str, MediumKind] = {"image_url": "image", "input_image": "image", "image_pil": "image",
                                 "video_url": "video"}  # fmt: skip
#: What a request may say of the format, and what vLLM adds to that for the formats of others.
SETTINGS = {"tools", "enable_thinking", "add_generation_prompt"}
VLLM_SETTINGS = {"documents", "reasoning_effort", "continue_final_message", "cohere_format", "tokenize"}

#: Where `keye.chat` wants a source and vLLM holds it.
_NO_SOURCE = "data:,"


class KeyeRenderer(HfRenderer):
    """Writes prompts; opening media is left to `keye_vllm.media`."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        model = config.model_config
        folder = resolve(model.tokenizer, revision=model.tokenizer_revision, weights=False)
        self._own, keye_config = Tokenizer.from_file(folder), model.hf_config.keye
        check_tokenizer(self._own, keye_config)
        self._pads = {"image": keye_config.image_token_id, "video": keye_config.video_token_id}
        default_system = load_generation_config(folder).default_system
        own, brought = template_of(keye_config.release, default_system), find_template(folder)
        self._format: ChatTemplate | CheckpointTemplate = own
        if brought is not None:
            self._format = brought.for_model(own, default_system, fall_back=True)

    def render_messages(self, messages: list[Any], params: ChatParams) -> Any:
        if params.chat_template is not None:
            conversation, prompt = super().render_messages(messages, params)
            return conversation, self._with_options(messages, prompt)
        conversation, media, uuids = parse_chat_messages(
            messages, self.model_config, content_format="openai", media_io_kwargs=params.media_io_kwargs,
            mm_processor_kwargs=params.mm_processor_kwargs,
        )  # fmt: skip
        return conversation, self._with_options(messages, self._prompt(conversation, params, media, uuids))

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> Any:
        if params.chat_template is not None:
            conversation, prompt = await super().render_messages_async(messages, params)
            return conversation, self._with_options(messages, prompt)
        conversation, media, uuids = await parse_chat_messages_async(
            messages, self.model_config, content_format="openai", media_io_kwargs=params.media_io_kwargs,
            mm_processor_kwargs=params.mm_processor_kwargs,
        )  # fmt: skip
        prompt = await asyncio.to_thread(self._prompt, conversation, params, media, uuids)
        return conversation, self._with_options(messages, prompt)

    def _prompt(self, conversation: Sequence[Any], params: ChatParams, media: Any, uuids: Any) -> dict[str, Any]:
        settings = {name: value for name, value in params.chat_template_kwargs.items() if value is not None}
        if unknown := sorted(settings.keys() - SETTINGS - VLLM_SETTINGS):
            raise KeyeError(f"chat_template_kwargs.{unknown[0]} is not known to keye's own format of prompts; use a "
                            "chat template that knows it (--chat-template)")  # fmt: skip
        for name in ("documents", "continue_final_message"):
            if settings.get(name):
                raise KeyeError(f"{name} is not known to keye's own format of prompts; leave it out")
        segments = self._format.render(
            [_message(turn) for turn in conversation],
            add_generation_prompt=settings.get("add_generation_prompt", True),
            thinking=settings.get("enable_thinking"),
            tools=settings.get("tools") or (),
        )
        prompt: dict[str, Any] = {"prompt_token_ids": self._ids(segments)}
        if media is not None:
            prompt["multi_modal_data"] = media
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids
        return prompt

    def _ids(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of a prompt, one placeholder for each medium."""
        ids: list[int] = []
        parts: list[tuple[str, bool]] = []
        for segment in segments:
            if isinstance(segment.value, Medium):
                ids += [*self._own.encode_parts(parts), self._pads[segment.value.kind]]
                parts = []
            else:
                parts.append((segment.value, segment.kind == "template"))
        return ids + self._own.encode_parts(parts)

    def _with_options(self, messages: Sequence[Any], prompt: Any) -> Any:
        """The prompt with the options that stand beside its media."""
        media = prompt.get("multi_modal_data")
        if not media:
            return prompt
        options = options_of(messages)
        joined = {
            kind: [as_medium(kind, *pair) for pair in zip(_listed(media[kind]), options[kind], strict=True)]
            if kind in options
            else media[kind]
            for kind in media
        }
        return {**prompt, "multi_modal_data": joined}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def options_of(messages: Sequence[Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The options of each medium of a conversation, by kind and in order: beside its address, inside the object that
    holds it, or as `preprocess_kwargs` in either place."""
    turns = [{"role": "user", "content": _only_media(message.get("content"))} for message in messages]
    media = [part for turn in normalize(turns) for part in turn.parts if isinstance(part, Medium)]
    return {kind: [medium.options for medium in media if medium.kind == kind] for kind in ("image", "video")}


def _only_media(content: Any) -> list[Any]:
    """The parts of a message in their places, those that hold no medium as any text, sources left out."""
    parts: list[Any] = []
    for part in content if isinstance(content, list) else ():
        name = _name_of(part)
        if name is None:
            parts.append("text")
            continue
        inner = part[name] if isinstance(part[name], Mapping) else {}
        outer = {key: value for key, value in part.items() if key not in (name, "type", "uuid") and value is not None}
        form = f"{_KINDS[name]}_url"
        parts.append({"type": form, form: {**inner, "url": _NO_SOURCE}, **outer})
    return parts or ["text"]


def _name_of(part: Any) -> str | None:
    """The field of a part that holds its medium."""
    return next((name for name in _KINDS if name in part), None) if isinstance(part, Mapping) else None


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as vLLM has parsed it, in the form of `keye.chat`."""
    role = "system" if turn["role"] == "developer" else turn["role"]
    message: dict[str, Any] = {"role": role}
    content = turn.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    thought = turn.get("reasoning") if role == "assistant" else None
    if thought:
        parts = [content] if isinstance(content, str) else list(content or [])
        content = [f"<think>\n{thought}\n</think>\n\n", *parts]
    if role == "assistant" and turn.get("tool_calls"):
        message["tool_calls"] = turn["tool_calls"]
        content = content or None
    if content is not None:
        message["content"] = content
    return message


def _part(part: Any) -> Any:
    if isinstance(part, str) or part.get("type") == "text":
        return part if isinstance(part, str) else part["text"]
    kind = part.get("type")
    if kind not in ("image", "video"):
        raise KeyeError(f"a part of type {kind!r} is not known to keye's own format of prompts; send text and media")
    return {"type": kind, kind: _NO_SOURCE}
