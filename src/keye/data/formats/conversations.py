"""Conversations as people write them: messages, ShareGPT and LLaVA, queries with responses, instructions, preferences.

Each function here turns the fields of a row into a `Talk`. What the fields are called is all that it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from keye.data.formats.context import Context
from keye.data.formats.media import OPTIONS, MediaFields, read_json
from keye.data.formats.talk import Talk, Turn, read_turn
from keye.data.samples import MODES, BadRow
from keye.errors import brief

#: Fields that every conversation may have.
SHARED: Final = frozenset({
    "image", "images", "video", "videos", "audio", "audios", "objects", "system", "tools", "mode", "enable_thinking",
    "task", "weight", "rejected_response", "rejected_messages", *OPTIONS,
})  # fmt: skip
#: Names of the two fields of a message.
_NAMES: Final = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))


def read_messages(fields: Mapping[str, Any], context: Context) -> Talk:
    """`messages`: OpenAI's and ms-swift's, ShareGPT's and LLaVA's; and lists of {"human": ..., "assistant": ...}."""
    return around(fields, read_turns("messages", fields["messages"]))


def read_response(fields: Mapping[str, Any], context: Context) -> Talk:
    """`query` and `response`, with pairs of both in `history` (ms-swift 1 and 2)."""
    turns = [
        *_history(fields.get("history")),
        Turn("user", fields.get("query") or ""),
        Turn("assistant", fields["response"]),
    ]
    return around(fields, turns)


def read_instruction(fields: Mapping[str, Any], context: Context) -> Talk:
    """`instruction`, `input` and `output` (Alpaca), with pairs in `history`; `chosen` and `rejected` in place of the
    output are a preference."""
    texts = [fields.get(name) or "" for name in ("instruction", "input")]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"instruction and input are {brief(texts)}; give texts")
    question = Turn("user", "\n".join(text for text in texts if text))
    before = [*_history(fields.get("history")), question]
    if "chosen" in fields and "rejected" in fields:
        won, lost = (_reply(name, fields[name]) for name in ("chosen", "rejected"))
        return around(fields, [*before, won], [lost])
    return around(fields, [*before, Turn("assistant", fields["output"])])


def read_preference(fields: Mapping[str, Any], context: Context) -> Talk:
    """`chosen` and `rejected` after a `prompt` or `messages`, or as conversations that begin alike (trl)."""
    before: list[Turn] = []
    for name in ("messages", "prompt"):
        value = fields.get(name)
        if value is not None:
            before = [Turn("user", value)] if isinstance(value, str) else read_turns(name, value)
    won, lost = (
        read_turns(name, fields[name]) if isinstance(fields[name], list | tuple) else [_reply(name, fields[name])]
        for name in ("chosen", "rejected")
    )
    return around(fields, *_split(before, won, lost))


def read_turns(name: str, entries: object) -> list[Turn]:
    """The turns of a list of messages under any names of their fields."""
    if isinstance(entries, str) and entries.lstrip().startswith("["):  # tables may hold lists as their JSON text
        entries = read_json(name, entries)
    if not isinstance(entries, list | tuple):
        raise BadRow(f"{name} is {brief(entries)}; give a list of messages")
    if not entries:
        raise BadRow("the conversation is empty")
    first = entries[0] if isinstance(entries[0], Mapping) else {}
    if "user" in first or "human" in first:
        return [turn for index, entry in enumerate(entries) for turn in _pair(f"{name} {index + 1}", entry)]
    role, content = next((names for names in _NAMES if names[0] in first and names[1] in first), _NAMES[0])
    if role not in first and "from" in first:
        role, content = _NAMES[1]
    return [
        read_turn(f"message {index + 1}", entry, role_key=role, content_key=content)
        for index, entry in enumerate(entries)
    ]


def around(fields: Mapping[str, Any], turns: Sequence[Turn], rejected: Sequence[Turn] = ()) -> Talk:
    """A talk with the fields that every conversation may have."""
    system = fields.get("system")
    if system and turns and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    if (lost := fields.get("rejected_response")) is not None and lost != "":
        rejected = (
            read_turns("rejected_response", lost) if isinstance(lost, list) else [_reply("rejected_response", lost)]
        )
    if fields.get("rejected_messages"):
        rejected = _split_rejected(turns, read_turns("rejected_messages", fields["rejected_messages"]))
    plain = len(turns) == 1 and turns[0].role == "assistant" and not rejected
    mode, task = fields.get("mode"), fields.get("task")
    if (thinks := fields.get("enable_thinking")) is not None:
        if not isinstance(thinks, bool):
            raise BadRow(f"enable_thinking is {brief(thinks)}; use true or false")
        mode = "think" if thinks else "no_think"
    return Talk(
        turns, MediaFields.of(fields), rejected, fields.get("objects"), fields.get("tools"),
        mode if mode in MODES else None, task if isinstance(task, str) else None, fields.get("weight"), plain,
    )  # fmt: skip


def _history(pairs: object) -> Iterator[Turn]:
    """Earlier questions with their replies."""
    if pairs is not None and not isinstance(pairs, list | tuple):
        raise BadRow(f"history is {brief(pairs)}; give a list of [query, response]")
    for pair in pairs or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history has {brief(pair)}; give [query, response]")
        yield Turn("user", pair[0])
        yield Turn("assistant", pair[1])


def _pair(where: str, entry: object) -> Iterator[Turn]:
    """Question and reply of {"human" or "user": ..., "assistant": ...}."""
    values = entry if isinstance(entry, Mapping) else {}
    question = next((name for name in ("human", "user") if name in values), None)
    if question is None or "assistant" not in values:
        raise BadRow(f"{where} is {brief(entry)}; give an object with user and assistant")
    yield Turn("user", values[question])
    yield Turn("assistant", values["assistant"])


def _reply(name: str, value: object) -> Turn:
    """A reply as a text or as a message of its own."""
    if isinstance(value, Mapping):
        (turn,) = read_turns(name, [value])
        return turn
    if not isinstance(value, str):
        raise BadRow(f"{name} is {brief(value)}; give the text of the reply")
    return Turn("assistant", value)


def _split(before: Sequence[Turn], won: Sequence[Turn], lost: Sequence[Turn]) -> tuple[list[Turn], Sequence[Turn]]:
    """The conversation that won, and the turns of the other in place of its last one."""
    if not won or not lost:
        raise BadRow("chosen or rejected has no message")
    if won[0].role == "assistant":
        return [*before, *won], _split_rejected(won, lost)
    return list(won), _split_rejected(won, lost)


def _split_rejected(won: Sequence[Turn], lost: Sequence[Turn]) -> Sequence[Turn]:
    same = len(won) - 1
    if [(turn.role, turn.content) for turn in lost[:same]] != [(turn.role, turn.content) for turn in won[:-1]]:
        raise BadRow("the rejected conversation does not begin as the chosen one")
    if len(lost) <= same:
        raise BadRow("the rejected conversation has no reply of its own")
    return lost[same:]
