"""A conversation as a row has it, before its media are in their places; and how it becomes a sample.

Every format of conversations leads to a `Talk`; what is checked here is checked for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from keye.chat.messages import Medium, Message, ToolCall, normalize, normalize_tools, to_json
from keye.chat.replies import read_call
from keye.data.files.rows import Row
from keye.data.formats.context import Context
from keye.data.formats.media import KINDS, MediaFields, Parts, Slot, make_medium, place_media, read_json
from keye.data.formats.objects import render_objects
from keye.data.samples import BadRow, Sample
from keye.errors import KeyeError, brief, is_number

#: Names of roles in data, and ours. "call" is a call of a tool as a message of its own.
ROLES: Final = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool",
    "observation": "tool", "tool_response": "tool", "function": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
#: Messages of one conversation.
MAX_TURNS: Final = 10_000


@dataclass(frozen=True)
class Turn:
    """One message: a role of ours or "call", a text or a list of content parts, calls of tools as data; `learn` is
    None where the row does not say."""

    role: str
    content: Any
    calls: Any = None
    learn: bool | None = None


@dataclass(frozen=True)
class Talk:
    """A conversation and the fields around it. `rejected` are turns in place of the last one; `plain` is a text that no
    chat template goes around."""

    turns: Sequence[Turn]
    media: MediaFields = field(default_factory=MediaFields)
    rejected: Sequence[Turn] = ()
    objects: Any = None
    tools: Any = None
    mode: str | None = None
    task: str | None = None
    weight: Any = None
    plain: bool = False


def read_turn(where: str, entry: object, *, role_key: str, content_key: str, roles: Mapping[str, str] = ROLES) -> Turn:
    """A message of a list: `role_key` and `content_key` are the names of its fields, `roles` those of its speakers."""
    if not isinstance(entry, Mapping):
        raise BadRow(f"{where} is a {type(entry).__name__}, not an object with {role_key} and {content_key}")
    role = entry.get(role_key)
    ours = roles.get(role) if isinstance(role, str) else None
    if ours is None:
        fault = f"{where} has no {role_key}" if role is None else f"{where} has the unknown {role_key} {brief(role)}"
        raise BadRow(f"{fault}; known are {', '.join(roles)}")
    learn = entry.get("loss", entry.get("weight", entry.get("train")))
    if learn is not None:
        if learn not in (0, 1):  # also False and True
            raise BadRow(f"{where} has a loss of {brief(learn)}; use true or false")
        learn = bool(learn)
    return Turn(ours, entry.get(content_key), entry.get("tool_calls"), learn)


def build_sample(talk: Talk, row: Row, context: Context) -> Sample:
    """The sample of a conversation. Raises `BadRow` for one that cannot be learnt from."""
    count = len(talk.turns)
    if not 0 < count <= MAX_TURNS:
        raise BadRow(f"the conversation has {count:,} messages, more than {MAX_TURNS:,}" if count else
                     "the conversation is empty")  # fmt: skip
    turns = [*talk.turns, *talk.rejected]
    has_media = bool(talk.media.images or talk.media.videos)
    contents = [_content(f"message {i + 1}", turn, has_media, row, context) for i, turn in enumerate(turns)]
    if talk.objects is not None:
        contents = render_objects(contents, talk.objects, talk.media, row, context)
    filled = place_media(contents, talk.media, row, context)
    messages, learn = _join([_message(i, turn, filled[i]) for i, turn in enumerate(turns[:count])], talk.turns)
    lost, _ = _join([_message(i, turns[i], filled[i]) for i in range(count, len(turns))], talk.rejected)
    _check_replies(messages, learn, lost)
    if talk.weight is not None and not (is_number(talk.weight) and talk.weight >= 0):
        raise BadRow(f"weight is {brief(talk.weight)}; give a number of 0 or more")
    return Sample(
        tuple(messages), tuple(learn), row.place, tuple(lost), read_tools(talk.tools), talk.mode or context.mode,
        talk.task, 1.0 if talk.weight is None else float(talk.weight), talk.plain,
    )  # fmt: skip


def _content(where: str, turn: Turn, has_media: bool, row: Row, context: Context) -> tuple[str, Parts]:
    """Role and parts of a message: texts, media and slots for media. The role is "text" where tags are plain text."""
    if turn.role == "call":
        return "text", ()
    content = turn.content
    if isinstance(content, str):
        return turn.role, (content,) if content else ()
    if content is None and turn.calls:
        return turn.role, ()
    if not isinstance(content, list | tuple):
        raise BadRow(f"{where} has the content {brief(content)}; give a text or a list of parts")
    parts = tuple(_part(f"{where}, part {i + 1}", part, row, context) for i, part in enumerate(content))
    return turn.role if has_media else "text", tuple(part for part in parts if part != "")


def _part(where: str, part: object, row: Row, context: Context) -> Any:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise BadRow(f"{where} is {brief(part)}; give a text or an object with a type")
    # Tables give every part the fields of all, those that it does not have as null.
    values = {name: value for name, value in part.items() if value is not None}
    kind = values.get("type")
    if kind in KINDS and len(values) == 1:
        return Slot(kind)
    try:
        (normal,) = normalize([{"role": "user", "content": [values]}])[0].parts
    except KeyeError as error:
        raise BadRow(f"{where}{str(error).removeprefix('messages[0].content[0]')}") from None
    if isinstance(normal, str):
        return normal
    return make_medium(normal.kind, normal.source, normal.options, row, context)


def _message(index: int, turn: Turn, parts: Parts) -> Message:
    """The message of a turn; calls of tools are read."""
    if turn.role != "call" and turn.calls is None:
        return Message(turn.role, parts)
    if turn.role != "call":
        try:
            (message,) = normalize([{"role": turn.role, "content": "", "tool_calls": turn.calls}])
        except KeyeError as error:
            raise BadRow(f"message {index + 1}{str(error).removeprefix('messages[0]')}") from None
        if broken := next((call for call in message.tool_calls if call.written is not None), None):
            raise BadRow(f"message {index + 1} calls {broken.name} with arguments that are not a JSON object")
        return Message(turn.role, parts, message.tool_calls)
    calls = turn.content if isinstance(turn.content, list) else [turn.content]
    read = [_read_call(call) for call in calls]
    if not read or None in read:
        raise BadRow(f'message {index + 1} is not a call of a tool ({brief(turn.content)}); write {{"name": ..., '
                     '"arguments": {...}}')  # fmt: skip
    return Message("assistant", (), tuple(call for call in read if call is not None))


def _read_call(call: object) -> ToolCall | None:
    if isinstance(call, Mapping):
        try:
            call = to_json(call)
        except (TypeError, ValueError, RecursionError):
            return None
    if isinstance(call, str) and call.lstrip().startswith("["):
        return None
    return read_call(call) if isinstance(call, str) else None


def _join(messages: Sequence[Message], turns: Sequence[Turn]) -> tuple[list[Message], list[bool]]:
    """The messages with calls that are messages of their own in the assistant's message before them, and which of them
    are learnt."""
    joined, learn = list[Message](), list[bool]()
    for message, turn in zip(messages, turns, strict=True):
        is_reply = message.role == "assistant"
        if turn.learn and not is_reply:
            raise BadRow(f"a message of the {message.role} is to be learnt; only replies are")
        is_learnt = is_reply and turn.learn is not False
        if turn.role == "call" and joined and joined[-1].role == "assistant" and learn[-1] == is_learnt:
            joined[-1] = replace(joined[-1], tool_calls=joined[-1].tool_calls + message.tool_calls)
            continue
        joined.append(message)
        learn.append(is_learnt)
    return joined, learn


def _check_replies(messages: Sequence[Message], learn: Sequence[bool], lost: Sequence[Message]) -> None:
    """What training needs: replies with content that follow what they reply to."""
    for index, message in enumerate(messages):
        before = messages[index - 1] if index else message
        if message.role == "assistant" and not _has_content(message):
            raise BadRow(f"message {index + 1} is an empty reply")
        if message.role == "tool" and not (before.tool_calls or (index and before.role == "tool")):
            raise BadRow(f"message {index + 1} is the result of a tool that was not called before it")
    if messages[-1].role != "assistant":
        raise BadRow(f"the last message is the {messages[-1].role}'s; the assistant's must be the last")
    if not any(learn):
        raise BadRow("no message is learnt")
    if lost and (lost[-1].role != "assistant" or not any(_has_content(message) for message in lost)):
        raise BadRow("the rejected reply is empty")
    if lost and tuple(lost) == (messages[-1],):
        raise BadRow("the rejected reply is the same as the chosen one")


def _has_content(message: Message) -> bool:
    return bool(message.tool_calls) or any(isinstance(part, Medium) or part.strip() for part in message.parts)


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions offered, which a row has as a list or as its JSON text."""
    if not tools:
        return ()
    if isinstance(tools, str):
        tools = read_json("tools", tools)
    try:
        return normalize_tools([tools] if isinstance(tools, Mapping) else tools)
    except KeyeError as error:
        raise BadRow(str(error)) from None
