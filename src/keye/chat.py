"""Messages to a prompt, and a reply to its parts: answer, reasoning, time intervals.

Knows the chat format and nothing of media, tokens or models: a medium is a placeholder that others fill in. Text that a
user wrote stays apart from the template's own, so that a special token typed by a user is never one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from keye.errors import KeyeError
from keye.tokenizer import MARKUP_TOKENS, POLYGON_TOKENS

Role = Literal["system", "user", "assistant"]
MediumKind = Literal["image", "video"]
Interval = tuple[float, float]
"""Start and end in seconds, start <= end."""

ROLES: Final = ("system", "user", "assistant")

IMAGE_OPTIONS: Final = frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width", "strict_official"})
VIDEO_OPTIONS: Final = IMAGE_OPTIONS | {
    "fps", "nframes", "min_frames", "max_frames", "video_total_pixels", "total_pixels", "video_start", "video_end",
    "min_frame_similarity", "timestamps",
}  # fmt: skip
_OPTIONS: Final = {"image": IMAGE_OPTIONS, "video": VIDEO_OPTIONS}
_MAY_BE_ZERO: Final = frozenset({"video_start", "video_end", "min_frame_similarity"})


# Messages


@dataclass(frozen=True)
class Medium:
    """An image or a video as the user named it: `source` is a path, URL, bytes or frames, `options` are its own."""

    kind: MediumKind
    source: object
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """One turn, checked: texts and media in their order."""

    role: Role
    parts: tuple[str | Medium, ...]


def normalize(messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """Check the messages of a conversation; a Message stands for itself.

    Every other is `{"role": ..., "content": ...}` with content a text or a list of `{"type": "text", "text": ...}`,
    `{"type": "image", "image": SOURCE, ...}`, `{"type": "video", "video": SOURCE, ...}`, or the OpenAI forms
    `{"type": "image_url", "image_url": {"url": SOURCE}}` and `video_url`. Options of a medium (IMAGE_OPTIONS,
    VIDEO_OPTIONS) stand beside the source or inside the `_url` object. Raises KeyeError naming the entry at fault.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise KeyeError('messages: give a list such as [{"role": "user", "content": "..."}].')
    if not messages:
        raise KeyeError("messages: the list is empty; give at least one message of the user.")
    checked = [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    for index, message in enumerate(checked):
        if message.role == "system" and index:
            raise KeyeError(f"messages[{index}]: a system message can only come first.")
    return checked


def _message(where: str, message: object) -> Message:
    if isinstance(message, Message):
        return message
    fields = _fields(where, message, allowed={"role", "content"}, required=("role", "content"))
    role, content = fields["role"], fields["content"]
    if role not in ROLES:
        raise KeyeError(f"{where}.role is {role!r}: use one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        return Message(cast(Role, role), (content,))
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise KeyeError(f"{where}.content: give a text, or a list of parts that is not empty.")
    parts = tuple(_part(f"{where}.content[{index}]", part) for index, part in enumerate(content))
    if role != "user" and any(isinstance(part, Medium) for part in parts):
        raise KeyeError(f"{where}: images and videos belong into messages of the user.")
    return Message(cast(Role, role), parts)


def _part(where: str, part: object) -> str | Medium:
    if isinstance(part, str):
        return part
    kind = _fields(where, part, allowed=None, required=("type",))["type"]
    if kind == "text":
        text = _fields(where, part, allowed={"type", "text"}, required=("text",))["text"]
        if not isinstance(text, str):
            raise KeyeError(f"{where}.text is a {type(text).__name__}: give a text.")
        return text
    medium: MediumKind
    for medium in ("image", "video"):
        if kind == medium:
            return _medium(where, medium, part, source_key=medium, also_allowed={"type"})
        if kind == f"{medium}_url":
            return _medium_url(where, medium, part)
    raise KeyeError(f"{where}.type is {kind!r}: use text, image, video, image_url or video_url.")


def _medium_url(where: str, kind: MediumKind, part: object) -> Medium:
    """The OpenAI form: the source is `url` inside the object, or the object is the URL itself."""
    key = f"{kind}_url"
    fields = _fields(where, part, allowed={"type", key, *_OPTIONS[kind]}, required=(key,))
    inner = fields[key] if isinstance(fields[key], Mapping) else {"url": fields[key]}
    outer = {name: value for name, value in fields.items() if name in _OPTIONS[kind]}
    if repeated := sorted(outer.keys() & inner.keys()):
        raise KeyeError(f"{where}.{repeated[0]} stands beside {key} and inside it: give it once.")
    return _medium(f"{where}.{key}", kind, {**inner, **outer}, source_key="url", also_allowed=set())


def _medium(where: str, kind: MediumKind, part: object, *, source_key: str, also_allowed: set[str]) -> Medium:
    fields = _fields(where, part, allowed={source_key, *also_allowed, *_OPTIONS[kind]}, required=(source_key,))
    source = fields[source_key]
    if source is None or (isinstance(source, str | bytes | list | tuple) and not source):
        raise KeyeError(f"{where}.{source_key} is empty: give a file, a URL or frames.")
    options = {name: fields[name] for name in sorted(fields) if name in _OPTIONS[kind] and fields[name] is not None}
    for name, value in options.items():
        _check_option(f"{where}.{name}", name, value)
    return Medium(kind, source, options)


def _check_option(where: str, name: str, value: object) -> None:
    if name == "strict_official":
        if not isinstance(value, bool):
            raise KeyeError(f"{where} is {value!r}: give true or false.")
        return
    if name == "timestamps":
        if not isinstance(value, list | tuple):
            raise KeyeError(f"{where} is {value!r}: give a list of seconds.")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KeyeError(f"{where} is {value!r}: give a number.")
    if not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
        raise KeyeError(f"{where} is {value}: give a positive number.")


def _fields(where: str, value: object, *, allowed: set[str] | None, required: tuple[str, ...]) -> Mapping[str, Any]:
    """`value` as a dictionary with all of `required` and nothing but `allowed` (None: anything)."""
    if not isinstance(value, Mapping):
        raise KeyeError(f"{where} is a {type(value).__name__}: give a dictionary with {' and '.join(required)}.")
    if missing := [name for name in required if name not in value]:
        raise KeyeError(f"{where} has no {missing[0]!r}: add it.")
    if allowed is not None and (unknown := sorted(str(name) for name in value if name not in allowed)):
        raise KeyeError(f"{where} has an unknown key {unknown[0]!r}: allowed are {', '.join(sorted(allowed))}.")
    return value


# Prompt


@dataclass(frozen=True)
class ChatTemplate:
    """What differs between the generations' chat formats.

    `default_system` is inserted if the first message is not the system's. `thinking` says how reasoning is switched:
    "prefill" opens (or closes at once) the reasoning block in the generation prompt, as Qwen3 does; "suffix" ends the
    last user text with /think or /no_think, as Preview and 1.5 do.
    """

    default_system: str | None = None
    thinking: Literal["prefill", "suffix"] = "prefill"


CHATML: Final = ChatTemplate()
"""2.0 and keye-nano. The template of 2.0 was never seen; this is the format of the model it was built from."""

PREVIEW_CHATML: Final = ChatTemplate(default_system="You are a helpful assistant.", thinking="suffix")
"""Preview and 1.5."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt.

    "template": text whose special tokens count. "text": text whose special tokens are plain characters. "image" and
    "video": a Medium, to be replaced by its visual tokens; the marks around it are template text already.
    """

    kind: Literal["template", "text", "image", "video"]
    value: str | Medium


_REPLY_MARKS: Final = re.compile("|".join(map(re.escape, MARKUP_TOKENS + POLYGON_TOKENS)))


def render(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    template: ChatTemplate | None = None,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
) -> list[Segment]:
    """The prompt of a conversation, in segments whose concatenation is the text the model reads.

    `template` is CHATML unless given. `thinking` True or False asks for reasoning or for none, None leaves it to the
    model. Reasoning in replies before the last user message is left out, as in the official template. Raises KeyeError
    for bad messages, and for a conversation that ends with a reply if a generation prompt is wanted.
    """
    template = template or CHATML
    turns = normalize(messages)
    if add_generation_prompt and turns[-1].role != "user":
        raise KeyeError(f"messages: the last one is the {turns[-1].role}'s; end with a message of the user.")
    if turns[0].role != "system" and template.default_system is not None:
        turns = [Message("system", (template.default_system,)), *turns]
    last_user = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        segments.append(Segment("template", f"<|im_start|>{turn.role}\n"))
        segments += _turn(turn, keep_reasoning=index > last_user)
        if index == last_user and thinking is not None and template.thinking == "suffix":
            segments.append(Segment("text", "/think" if thinking else "/no_think"))
        segments.append(Segment("template", "<|im_end|>\n"))
    if add_generation_prompt:
        segments.append(Segment("template", _generation_prompt(template, thinking)))
    return _joined(segments)


def _turn(turn: Message, *, keep_reasoning: bool) -> Iterable[Segment]:
    for part in turn.parts:
        if isinstance(part, Medium):
            yield Segment("template", "<|vision_start|>")
            yield Segment(part.kind, part)
            yield Segment("template", "<|vision_end|>")
        elif turn.role == "assistant":
            yield from _reply(part if keep_reasoning else _without_reasoning(part))
        else:
            yield Segment("text", part)


def _without_reasoning(text: str) -> str:
    _, closed, answer = text.rpartition("</think>")
    return answer.lstrip("\n") if closed else text


def _reply(text: str) -> Iterable[Segment]:
    """A reply of the model: the marks it may write are tokens again, control tokens are not."""
    end = 0
    for match in _REPLY_MARKS.finditer(text):
        yield Segment("text", text[end : match.start()])
        yield Segment("template", match.group())
        end = match.end()
    yield Segment("text", text[end:])


def _generation_prompt(template: ChatTemplate, thinking: bool | None) -> str:
    prompt = "<|im_start|>assistant\n"
    if thinking is None or template.thinking == "suffix":
        return prompt
    return prompt + ("<think>\n" if thinking else "<think>\n\n</think>\n\n")


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same prompt without empty segments and with neighbours of one kind of text merged."""
    joined: list[Segment] = []
    filled = (segment for segment in segments if segment.value)
    for kind, neighbours in itertools.groupby(filled, key=lambda segment: segment.kind):
        if kind == "image" or kind == "video":
            joined += neighbours
        else:
            joined.append(Segment(kind, "".join(cast(str, segment.value) for segment in neighbours)))
    return joined


# Replies


@dataclass(frozen=True)
class Reply:
    """A reply taken apart: the answer without its wrapping, the reasoning or None, the intervals in the answer."""

    text: str
    reasoning: str | None = None
    intervals: tuple[Interval, ...] = ()


def parse_reply(text: str) -> Reply:
    """Split a finished reply.

    Reasoning is what stands in `<think>` and `<analysis>`, also if the prompt opened the block or the reply was cut off
    inside it; the answer is the last `<answer>` body if there is one. This is the official order of extraction, except
    that a final `\\boxed{}` is left to the evaluation of the task that asks for one.
    """
    reasoning: list[str] = []
    for tag in ("analysis", "think"):
        inside, text = _split_block(text, tag)
        if inside:
            reasoning.append(inside)
    _, opened, answer = text.rpartition("<answer>")
    text = (answer.partition("</answer>")[0] if opened else text).strip()
    return Reply(text, "\n\n".join(reasoning) or None, tuple(parse_intervals(text) or ()))


def _split_block(text: str, tag: str) -> tuple[str, str]:
    """What stands in the block `tag` at the start of `text`, and the rest."""
    inside, closed, rest = text.rpartition(f"</{tag}>")
    if closed:
        return inside.replace(f"<{tag}>", "", 1).strip(), rest
    before, opened, inside = text.partition(f"<{tag}>")
    if opened and not before.strip():
        return inside.strip(), ""
    return "", text


# Times in replies. Every repetition is bounded, so that matching is linear in the length of any text.
_TIME: Final = r"((?:[0-9]{1,3}:){0,2}[0-9]{1,7}(?:\.[0-9]{1,6})?)"
_PAIR: Final = re.compile(rf"\[\s{{0,4}}{_TIME} ?s?\s{{0,4}},\s{{0,4}}{_TIME} ?s?\s{{0,4}}\]")
_OPENING: Final = re.compile(r"(?:\[|<\|clip_time_start\|>)\s{0,4}\Z")
_COMMA: Final = re.compile(r"\s{0,4},\s{0,4}\Z")
_EMPTY: Final = re.compile(r"\[\s{0,4}\]")
_COORDINATE_MARKS: Final = ("point", "box", "quad", "polygon")


def parse_intervals(text: str) -> list[Interval] | None:
    """The time intervals written in `text`, in seconds and in their order; None if it holds no list of intervals.

    Read are `[[start, end], ...]`, `[]` (never) and `<|clip_time_start|>[start, end]<|clip_time_end|>`; a time is
    seconds, mm:ss or hh:mm:ss, each with optional decimals. Pairs that end before they start are left out, and so are
    coordinates between point, box, quad and polygon marks.
    """
    text = _without_coordinates(text)
    found: list[Interval] = []
    previous_end = None
    for match in _PAIR.finditer(text):
        continues = previous_end is not None and _COMMA.fullmatch(text, previous_end, match.start())
        if not continues and not _OPENING.search(text, max(0, match.start() - 24), match.start()):
            previous_end = None
            continue
        previous_end = match.end()
        start, end = to_seconds(match.group(1)), to_seconds(match.group(2))
        if start <= end:
            found.append((start, end))
    return found if found or _EMPTY.search(text) else None


def _without_coordinates(text: str) -> str:
    for name in _COORDINATE_MARKS:
        kept = []
        opening, closing = f"<|{name}_start|>", f"<|{name}_end|>"
        before, *blocks = text.split(opening)
        for block in blocks:
            kept.append(block.partition(closing)[2])
        text = before + "".join(kept)
    return text


def to_seconds(time: str) -> float:
    """Seconds of "75.5", "1:15.5" or "0:01:15.5"; raises KeyeError for anything else."""
    if not re.fullmatch(_TIME, time):
        raise KeyeError(f"{time[:40]!r} is no time: write seconds, mm:ss or hh:mm:ss.")
    seconds = 0.0
    for field_ in time.split(":"):
        seconds = seconds * 60 + float(field_)
    return seconds


def format_seconds(seconds: float) -> str:
    """A time for people, with one decimal: "7.5 s" below a minute, then "1:07.5" and "1:00:07.5"."""
    tenths = round(seconds * 10)
    sign, tenths = ("-" if tenths < 0 else ""), abs(tenths)
    if tenths < 600:
        return f"{sign}{tenths / 10:.1f} s"
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{sign}{clock}:{tenths / 10:04.1f}"


def merge_intervals(intervals: Iterable[Sequence[float]]) -> list[Interval]:
    """The same time as sorted intervals that neither overlap nor touch."""
    merged: list[Interval] = []
    for start, end in sorted((float(start), float(end)) for start, end in intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
