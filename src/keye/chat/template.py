"""A conversation to the text that the model reads, in our own chat format: the default for every release."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

from keye.chat.messages import Medium, Message, normalize, normalize_tools, to_json
from keye.chat.tokenizer import MARKUP_TOKENS, POLYGON_TOKENS
from keye.errors import KeyeError
from keye.releases import PREVIEW, Release

#: Files of a checkpoint that may hold a chat template; the first that does counts.
TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ChatTemplate:
    """What differs between the releases' chat formats.

    `default_system` is inserted if the first message is not the system's. `thinking` says how reasoning is switched:
    "prefill" opens (or closes at once) the reasoning block in the generation prompt, as Qwen3 does; "suffix" ends the
    last user text with /think or /no_think, as Preview and 1.5 do.
    """

    default_system: str | None = None
    thinking: Literal["prefill", "suffix"] = "prefill"

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        add_vision_id: bool = False,
    ) -> list[Segment]:
        """The prompt of a conversation, in segments whose concatenation is the text the model reads.

        `thinking` True or False asks for reasoning or for none, None leaves it to the model. `tools` are the functions
        that the model may call, as `normalize_tools` reads them. `add_vision_id` counts the media of each kind through
        the conversation, as "Picture 1: " and "Video 1: " before them. Reasoning in replies before the last user
        message is left out, as in the official template. Raises KeyeError for bad messages, and for a conversation
        that ends with a reply if a generation prompt is wanted.
        """
        suffix = SUFFIXES[bool(thinking)] if self.thinking == "suffix" and thinking is not None else None
        turns = prepare_turns(messages, add_generation_prompt, self.default_system, suffix)
        segments: list[Segment] = []
        if offered := normalize_tools(tools):
            system = turns.pop(0).parts if turns[0].role == "system" else ()
            segments += _add_tools(system, offered)
        last_user = find_last_user_turn(turns)
        numbers = {"image": itertools.count(1), "video": itertools.count(1)} if add_vision_id else None
        for role, group in itertools.groupby(enumerate(turns), key=lambda pair: pair[1].role):
            if role == "tool":  # results of neighbouring calls share one turn, which is the user's
                segments += _tool_results([turn for _, turn in group])
                continue
            for index, turn in group:
                segments.append(Segment("template", f"<|im_start|>{role}\n"))
                segments += _turn(turn, numbers, keep_reasoning=index > last_user)
                segments.append(Segment("template", "<|im_end|>\n"))
        if add_generation_prompt:
            block = "" if thinking is None or self.thinking == "suffix" else "<think>\n" if thinking else _NO_THOUGHT
            segments.append(Segment("template", f"<|im_start|>assistant\n{block}"))
        return joined(segments)


CHATML: Final = ChatTemplate()
"""2.0 and keye-nano. The template of 2.0 was never seen; this is the format of the model it was built from."""


def template_of(release: Release, default_system: str | None = None) -> ChatTemplate:
    """Our template for the models of a release; `default_system` replaces the release's own."""
    return ChatTemplate(release.default_system if default_system is None else default_system, release.thinking)


PREVIEW_CHATML: Final = template_of(PREVIEW)
"""Preview and 1.5."""


def may_bring_template(folder: Path) -> bool:
    """Whether a checkpoint folder may hold a chat template of its own, found without parsing its files."""
    if any((folder / name).exists() for name in TEMPLATE_FILES[:-1]):
        return True
    settings = folder / TEMPLATE_FILES[-1]
    return settings.exists() and b"chat_template" in settings.read_bytes()


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt.

    "template": text whose special tokens count. "text": text whose special tokens are plain characters. "image" and
    "video": a Medium, to be replaced by its visual tokens; the marks around it are template text already.
    """

    kind: Literal["template", "text", "image", "video"]
    value: str | Medium


_REPLY_MARKS: Final = re.compile(f"({'|'.join(map(re.escape, MARKUP_TOKENS + POLYGON_TOKENS))})")


def split_reply(text: str) -> list[str]:
    """A reply of the model cut at the marks that it may write: texts at even places, marks at odd ones."""
    return _REPLY_MARKS.split(text)


def count_marks(text: str, most: int) -> int:
    """How many marks `split_reply` finds in a text; counting ends after `most`."""
    return sum(1 for _ in itertools.islice(_REPLY_MARKS.finditer(text), most + 1))


#: How "suffix" models are asked for reasoning, and for none.
SUFFIXES: Final = {True: "/think", False: "/no_think"}
_NO_THOUGHT: Final = "<think>\n\n</think>\n\n"
_VISION_NAMES: Final = {"image": "Picture", "video": "Video"}

#: How functions are offered: the words that the models were trained on (Preview's tokenizer_config.json).
_TOOLS_BEFORE: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER: Final = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def opens_reasoning(segments: Sequence[Segment]) -> bool:
    """Whether a prompt ends inside a block of reasoning that the template, or the reply to be continued, has opened."""
    for segment in reversed(segments):
        markup = str(segment.value) if segment.kind == "template" else ""
        last = max(("<think>", "</think>", "<|im_start|>"), key=markup.rfind)
        if last in markup:
            return last == "<think>"
    return False


def drop_last_end(messages: Sequence[Mapping[str, Any] | Message], segments: Sequence[Segment]) -> list[Segment]:
    """A rendered prompt without the end of its last message, which the model is to go on with. `KeyeError` for one that
    is not the assistant's, or says nothing."""
    (last,) = normalize(messages)[-1:]
    if last.role != "assistant" or last.tool_calls:
        raise KeyeError("continue_final_message needs a text of the assistant as the last message.")
    *before, end = segments
    at = str(end.value).rfind("<|im_end|>")
    if end.kind != "template" or at < 0 or not any(isinstance(part, str) and part.strip() for part in last.parts):
        raise KeyeError("continue_final_message: the last message has no text, or the template no end of a message.")
    return joined([*before, Segment("template", str(end.value)[:at])])


def prepare_turns(
    messages: Sequence[Mapping[str, Any] | Message],
    add_generation_prompt: bool,
    default_system: str | None,
    suffix: str | None,
) -> list[Message]:
    """The messages as `normalize` returns them, after a system message and with `suffix` at the end of the last user
    text; KeyeError if a reply is wanted and the system has spoken alone."""
    turns = normalize(messages)
    if add_generation_prompt and all(turn.role == "system" for turn in turns):
        raise KeyeError("messages: the system speaks alone; end with a message of the user.")
    if turns[0].role != "system" and default_system is not None:
        turns = [Message("system", (default_system,)), *turns]
    if suffix is not None and (index := find_last_user_turn(turns)) >= 0:
        turns[index] = replace(turns[index], parts=(*turns[index].parts, suffix))
    return turns


def find_last_user_turn(turns: Sequence[Message]) -> int:
    """Index of the last message of the user, -1 if there is none."""
    return max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)


def _add_tools(system: Sequence[str | Medium], tools: Sequence[Mapping[str, Any]]) -> Iterable[Segment]:
    yield Segment("template", "<|im_start|>system\n")
    if system:
        for part in system:
            yield from _part(part)
        yield Segment("template", "\n\n")
    yield Segment("template", _TOOLS_BEFORE)
    for tool in tools:
        yield Segment("template", "\n")
        yield Segment("text", to_json(tool))
    yield Segment("template", _TOOLS_AFTER + "<|im_end|>\n")


def _tool_results(turns: Sequence[Message]) -> Iterable[Segment]:
    yield Segment("template", "<|im_start|>user")
    for turn in turns:
        yield Segment("template", "\n<tool_response>\n")
        for part in turn.parts:
            yield from _part(part)
        yield Segment("template", "\n</tool_response>")
    yield Segment("template", "<|im_end|>\n")


def _part(part: str | Medium) -> Iterable[Segment]:
    """A text as it stands, or a medium between its marks."""
    if isinstance(part, str):
        yield Segment("text", part)
        return
    yield Segment("template", "<|vision_start|>")
    yield Segment(part.kind, part)
    yield Segment("template", "<|vision_end|>")


def _turn(turn: Message, numbers: Mapping[str, Iterator[int]] | None, *, keep_reasoning: bool) -> Iterable[Segment]:
    for part in turn.parts:
        if isinstance(part, Medium):
            if numbers is not None:
                yield Segment("template", f"{_VISION_NAMES[part.kind]} {next(numbers[part.kind])}: ")
            yield from _part(part)
        elif turn.role == "assistant":
            # The marks that a model may write are tokens again, control tokens are not.
            for index, piece in enumerate(split_reply(part if keep_reasoning else _drop_reasoning(part))):
                yield Segment("template" if index % 2 else "text", piece)
        else:
            yield from _part(part)
    text = _drop_reasoning("".join(part for part in turn.parts if isinstance(part, str)))
    for index, call in enumerate(turn.tool_calls):
        yield Segment("template", "\n<tool_call>\n" if index or text else "<tool_call>\n")
        yield Segment("text", call.to_json())
        yield Segment("template", "\n</tool_call>")


def _drop_reasoning(text: str) -> str:
    _, closed, answer = text.rpartition("</think>")
    return answer.lstrip("\n") if closed else text


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same prompt without empty segments and with neighbours of one kind of text merged."""
    merged: list[Segment] = []
    filled = (segment for segment in segments if segment.value)
    for kind, neighbours in itertools.groupby(filled, key=lambda segment: segment.kind):
        if kind == "image" or kind == "video":
            merged += neighbours
        else:
            merged.append(Segment(kind, "".join(cast(str, segment.value) for segment in neighbours)))
    return merged
