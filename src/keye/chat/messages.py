"""The messages of a conversation, checked: who speaks, texts, media, calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS, MediumKind
from keye.errors import KeyeError, KeyeWarning, brief, closest, is_number, warn

#: One of ROLES, or a name of a user's own.
Role = str

ROLES: Final = ("system", "user", "assistant", "tool")

_OPTIONS: Final = {"image": IMAGE_OPTIONS, "video": VIDEO_OPTIONS}
_MAY_BE_ZERO: Final = frozenset({"video_start", "video_end", "min_frame_similarity"})
_ROLE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_KEYS: Final = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
#: OpenAI's key beside an image's URL.
_DETAILS: Final = ("auto", "low", "high")
#: Characters of the arguments of one call.
MAX_ARGUMENTS: Final = 1_000_000
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class Medium:
    """An image or a video as the user named it: `source` is a path, URL, bytes or frames, `options` are its own."""

    kind: MediumKind
    source: object
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCall:
    """A call of a function that a model wrote: its name and its arguments as JSON data. `written` is the text of
    arguments that are no JSON object, such as those of a reply that was cut off."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    written: str | None = None  # vocabulary: allow (a field of public data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `written` only where there is one."""
        call: dict[str, Any] = {"name": self.name, "arguments": dict(self.arguments)}
        return call if self.written is None else call | {"written": self.written}

    def to_json(self) -> str:
        """`{"name": ..., "arguments": {...}}` on one line, as it stands in a prompt."""
        return f'{{"name": {to_json(self.name)}, "arguments": {self.arguments_json()}}}'

    def arguments_json(self) -> str:
        """The arguments as JSON, or as they were written where they are none."""
        return to_json(self.arguments) if self.written is None else self.written


@dataclass(frozen=True)
class Message:
    """One turn, checked: texts and media in their order; `tool_calls` follow the text of an assistant's turn."""

    role: Role
    parts: tuple[str | Medium, ...]
    tool_calls: tuple[ToolCall, ...] = ()


def to_json(value: object) -> str:
    """JSON as chat templates write it: on one line, every character as itself."""
    return json.dumps(value, ensure_ascii=False)


def normalize(messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """Check the messages of a conversation; a Message stands for itself.

    Every other is `{"role": ..., "content": ...}` with content a text or a list of `{"type": "text", "text": ...}`,
    `{"type": "image", "image": SOURCE, ...}`, `{"type": "video", "video": SOURCE, ...}`, or the OpenAI forms
    `{"type": "image_url", "image_url": {"url": SOURCE}}` and `video_url`; `detail` beside an image's URL is checked and
    has no effect. Options of a medium (IMAGE_OPTIONS, VIDEO_OPTIONS) stand beside the source, inside the `_url` object,
    or in a `preprocess_kwargs` object at either place. An assistant's message may have `tool_calls` (`{"function":
    {"name": ..., "arguments": ...}}`) and then needs no content; a message of role
    "tool" carries the result of a call. Raises KeyeError naming the entry at fault.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise KeyeError('messages: give a list such as [{"role": "user", "content": "..."}].')
    if not messages:
        raise KeyeError("messages: the list is empty; give at least one message of the user.")
    checked = [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    for index, message in enumerate(checked):
        before = checked[index - 1] if index else message
        if message.role == "tool" and not (before.tool_calls or (index and before.role == "tool")):
            raise KeyeError(f"messages[{index}]: a tool's result must follow the assistant's tool_calls.")
    return checked


def _message(where: str, message: object) -> Message:
    if isinstance(message, Message):
        return message
    role = _fields(where, message, allowed=None, required=("role",))["role"]
    if not isinstance(role, str) or role not in ROLES:
        if not isinstance(role, str) or not _ROLE_NAME.fullmatch(role) or closest(role, ROLES) is not None:
            raise KeyeError(f"{where}.role is {brief(role)}: use one of {', '.join(ROLES)}, or a name of your own.")
        note = f"{where}.role is {role}, which models do not know; the message stands under that name in the prompt"
        warn(KeyeWarning(note), stacklevel=2)
    fields = _fields(where, message, allowed=_KEYS.get(role, _KEYS["user"]), required=())
    calls: tuple[ToolCall, ...] = ()
    if (listed := fields.get("tool_calls")) is not None:
        if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
            raise KeyeError(f"{where}.tool_calls: give a list of calls.")
        calls = tuple(_tool_call(f"{where}.tool_calls[{index}]", call) for index, call in enumerate(listed))
    content = fields.get("content")
    if content is None and calls:
        return Message("assistant", (), calls)
    if "content" not in fields:
        raise KeyeError(f"{where} has no 'content': add it.")
    if isinstance(content, str):
        return Message(role, (content,), calls)
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise KeyeError(f"{where}.content: give a text, or a list of parts that is not empty.")
    parts = tuple(_part(f"{where}.content[{index}]", part) for index, part in enumerate(content))
    return Message(role, parts, calls)


def _tool_call(where: str, call: object) -> ToolCall:
    """The OpenAI form, whose arguments are JSON text, or `{"name": ..., "arguments": {...}}`."""
    if isinstance(call, ToolCall):
        return call
    fields = _fields(where, call, allowed={"id", "type", "index", "function", "name", "arguments"}, required=())
    inner = fields
    if "function" in fields:
        inner = _fields(f"{where}.function", fields["function"], allowed=None, required=())
    name, arguments = tool_name(where, inner.get("name")), inner.get("arguments", {})
    if isinstance(arguments, str):
        if len(arguments) > MAX_ARGUMENTS:
            raise KeyeError(f"{where}.arguments has more than {MAX_ARGUMENTS:,} characters: send less.")
        try:
            data = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, Mapping):
            return ToolCall(name, data)
        # What a model was cut off in, or got wrong, stands in the prompt as it is.
        note = f"{where}.arguments of {name} is not a JSON object; the prompt shows it to the model as it is"
        warn(KeyeWarning(note), stacklevel=2)
        return ToolCall(name, {}, arguments)
    if not isinstance(arguments, Mapping):
        raise KeyeError(f"{where}.arguments of {name} is a {type(arguments).__name__}: give an object.")
    return ToolCall(name, arguments)


def tool_name(where: str, name: object) -> str:
    """`name` if a tool can be called so: letters, digits, and `_ . : -`."""
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise KeyeError(f"{where} has the name {brief(name)}: use letters, digits, '_', '-', '.' and ':'.")
    return name


def normalize_tools(tools: object) -> tuple[Mapping[str, Any], ...]:
    """Check the functions offered to a model; each comes back as `{"type": "function", "function": {...}}`.

    Each is that form or the inner object alone: `name`, optionally `description` and `parameters` (a JSON schema).
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise KeyeError("tools: give a list of functions, each with a name.")
    return tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))


def _tool(where: str, tool: object) -> Mapping[str, Any]:
    fields = _fields(where, tool, allowed=None, required=())
    if "function" not in fields:
        fields = {"type": "function", "function": fields}
    if fields.get("type") != "function":
        raise KeyeError(f"{where}.type is {brief(fields.get('type'))}: only functions can be offered.")
    inner = _fields(f"{where}.function", fields["function"], allowed=None, required=("name",))
    tool_name(f"{where}.function", inner["name"])
    if inner.get("parameters") is None:
        inner = {name: value for name, value in inner.items() if name != "parameters"}
        fields = {**fields, "function": inner}
    if not isinstance(inner.get("parameters", {}), Mapping):
        raise KeyeError(f"{where}.function.parameters is a {type(inner['parameters']).__name__}: give a JSON schema.")
    try:
        to_json(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise KeyeError(f"{where} is not JSON ({error}): give plain data.") from None
    return fields


def _part(where: str, part: object) -> str | Medium:
    if isinstance(part, str):
        return part
    kind = _fields(where, part, allowed=None, required=("type",))["type"]
    if kind == "text":
        text = _fields(where, part, allowed={"type", "text"}, required=("text",))["text"]
        if not isinstance(text, str):
            raise KeyeError(f"{where}.text is {brief(text)}: give a text.")
        return text
    medium: MediumKind
    for medium in ("image", "video"):
        url_key = f"{medium}_url"
        if kind == medium and not (isinstance(part, Mapping) and url_key in part):
            return _medium(where, medium, part, source_key=medium, also_allowed={"type"})
        if kind in (medium, url_key):  # the official utilities also read {"type": "image", "image_url": SOURCE}
            return _medium_url(where, medium, part)
    raise KeyeError(f"{where}.type is {brief(kind)}: use text, image, video, image_url or video_url.")


def _medium_url(where: str, kind: MediumKind, part: object) -> Medium:
    """The OpenAI form: the source is `url` inside the object, or the object is the URL itself."""
    key = f"{kind}_url"
    fields = _fields(where, part, allowed={"type", key, "preprocess_kwargs", *_OPTIONS[kind]}, required=(key,))
    inner = fields[key] if isinstance(fields[key], Mapping) else {"url": fields[key]}
    if kind == "image" and "detail" in inner:  # OpenAI's two fixed sizes, which Keye does not have
        detail = inner["detail"]
        if detail not in _DETAILS:
            raise KeyeError(f"{where}.image_url.detail is {brief(detail)}: use one of {', '.join(_DETAILS)}.")
        if detail != "auto":
            warn(KeyeWarning("detail has no effect on images: min_pixels and max_pixels set their size"), stacklevel=2)
        inner = {name: value for name, value in inner.items() if name != "detail"}
    outer = {name: value for name, value in fields.items() if name not in ("type", key)}
    if repeated := sorted(outer.keys() & inner.keys()):
        raise KeyeError(f"{where}.{repeated[0]} stands beside {key} and inside it: give it once.")
    return _medium(f"{where}.{key}", kind, {**inner, **outer}, source_key="url", also_allowed=set())


def _medium(where: str, kind: MediumKind, part: object, *, source_key: str, also_allowed: set[str]) -> Medium:
    allowed = {source_key, "preprocess_kwargs", *also_allowed, *_OPTIONS[kind]}
    fields = _fields(where, part, allowed=allowed, required=(source_key,))
    if "preprocess_kwargs" in fields:
        also = _fields(
            f"{where}.preprocess_kwargs", fields["preprocess_kwargs"], allowed=set(_OPTIONS[kind]), required=()
        )
        if repeated := sorted(also.keys() & fields.keys()):
            raise KeyeError(f"{where}.{repeated[0]} stands in preprocess_kwargs and beside it: give it once.")
        fields = {**fields, **also}
    source = fields[source_key]
    if source is None or (isinstance(source, str | bytes | list | tuple) and not source):
        raise KeyeError(f"{where}.{source_key} is empty: give a file, a URL or frames.")
    options = {name: fields[name] for name in sorted(fields) if name in _OPTIONS[kind] and fields[name] is not None}
    if "timestamps" in options:
        options["timestamps"] = _seconds(f"{where}.timestamps", options["timestamps"])
    for name, value in options.items():
        _check_option(f"{where}.{name}", name, value)
    return Medium(kind, source, options)


def _seconds(where: str, value: object) -> tuple[float, ...]:
    """Seconds as plain numbers, of a list as well as of an array or a tensor."""
    try:
        if isinstance(value, str | bytes | Mapping):
            raise TypeError
        return tuple(float(second) for second in cast(Sequence[Any], value))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: rows of a tensor with several axes
        raise KeyeError(f"{where} is {' '.join(brief(value).split())}: give a list of seconds.") from None


def _check_option(where: str, name: str, value: object) -> None:
    if name in ("strict_official", "strict_media", "adaptive_budget", "deinterlace", "tone_map"):
        if not isinstance(value, bool):
            raise KeyeError(f"{where} is {brief(value)}: give true or false.")
        return
    if name == "timestamps":
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise KeyeError(f"{where} is {brief(value)}: give a number.")
    if not is_number(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
        raise KeyeError(f"{where} is {brief(value)}: give a positive number.")


def _fields(where: str, value: object, *, allowed: set[str] | None, required: tuple[str, ...]) -> Mapping[str, Any]:
    """`value` as a dictionary with all of `required` and nothing but `allowed` (None: anything)."""
    if not isinstance(value, Mapping):
        wanted = f" with {' and '.join(required)}" if required else ""
        raise KeyeError(f"{where} is a {type(value).__name__}: give a dictionary{wanted}.")
    if missing := [name for name in required if name not in value]:
        raise KeyeError(f"{where} has no {missing[0]!r}: add it.")
    if allowed is not None and (unknown := sorted(str(name) for name in value if name not in allowed)):
        raise KeyeError(f"{where} has an unknown key {brief(unknown[0])}: allowed are {', '.join(sorted(allowed))}.")
    return value
