"""A reply in the form of Anthropic's interface: the message, and the events of its stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from keye.chat.stream import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress
from keye.server.edge.ids import new_id
from keye.server.openai.events import ChatReply, keye_fields, usage_of
from keye.server.openai.http import event
from keye.server.openai.prepare import PreparedChat

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_BLOCKS: Final = {"reasoning": "thinking", "content": "text", "arguments": "tool_use"}
#: Of each kind of block the kind of its deltas, and the field that holds what is added.
_DELTAS: Final = {
    "thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}  # fmt: skip


def message_object(model: str, reply: ChatReply, finished: Finished, chat: PreparedChat) -> dict[str, Any]:
    """A finished reply."""
    content: list[dict[str, Any]] = []
    if reply.reasoning:
        content.append({"type": "thinking", "thinking": reply.reasoning, "signature": ""})
    if reply.text or not reply.calls:
        content.append({"type": "text", "text": reply.text})
    content += [
        {"type": "tool_use", "id": _tool_id(number), "name": name, "input": _arguments(arguments)}
        for number, name, arguments in reply.calls
    ]
    return {
        **_begin(model),
        "content": content,
        **_end(reply),
        "usage": _usage(finished, reply, chat),
        "keye": keye_fields(finished, reply.text, chat.notes),
    }


class MessageEncoder:
    """Encodes the events of one message. One block is open at a time, `_index` is its number."""

    def __init__(self, model: str, chat: PreparedChat) -> None:
        self._model, self._reply, self._chat = model, ChatReply.of(chat), chat
        self._begun, self._kind, self._index = False, "", -1

    def encode(self, item: Event) -> Iterator[bytes]:
        if isinstance(item, Progress) and item.phase == "prefill":
            yield from self._start(item.total)
        elif isinstance(item, Delta | Ended):
            yield from self._start(0)
            for piece in self._reply.add(item) if isinstance(item, Delta) else self._reply.end(item):
                yield from self._piece(piece)
        elif isinstance(item, Finished):
            if self._index < 0:
                yield from self._open("text", {"text": ""})
            yield from self._close()
            usage = _usage(item, self._reply, self._chat)
            fields = keye_fields(item, self._reply.text, self._chat.notes)
            yield _event("message_delta", delta=_end(self._reply), usage=usage, keye=fields)
            yield _event("message_stop")

    def _start(self, tokens: int) -> Iterator[bytes]:
        """The beginning, as soon as the length of the prompt is known; cached tokens are reported at the end."""
        if self._begun:
            return
        self._begun = True
        usage = {
            "input_tokens": tokens, "output_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        }  # fmt: skip
        message = {**_begin(self._model), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=message)
        yield _event("ping")

    def _piece(self, piece: ReplyPiece) -> Iterator[bytes]:
        if piece.kind == "call":
            number, name, _ = self._reply.calls[piece.index]
            yield from self._open("tool_use", {"id": _tool_id(number), "name": name, "input": {}})
            return
        kind = _BLOCKS[piece.kind]
        if kind != self._kind:
            yield from self._open(kind, {"text": ""} if kind == "text" else {"thinking": "", "signature": ""})
        delta, field = _DELTAS[kind]
        yield _event("content_block_delta", index=self._index, delta={"type": delta, field: piece.text})

    def _open(self, kind: str, fields: Mapping[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self._kind, self._index = kind, self._index + 1
        yield _event("content_block_start", index=self._index, content_block={"type": kind, **fields})

    def _close(self) -> Iterator[bytes]:
        if self._kind:
            self._kind = ""
            yield _event("content_block_stop", index=self._index)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _begin(model: str) -> dict[str, Any]:
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}


def _end(reply: ChatReply) -> dict[str, Any]:
    ended = reply.ended
    if ended is not None and ended.is_requested and isinstance(ended.met, str) and reply.reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": ended.met}
    return {"stop_reason": _REASONS.get(str(reply.reason), "end_turn"), "stop_sequence": None}


def _tool_id(number: str) -> str:
    return f"toolu_{number.removeprefix('call_')}"


def _arguments(text: str) -> Any:
    """The arguments of a call; {} for one that was cut short."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _usage(finished: Finished, reply: ChatReply, chat: PreparedChat) -> dict[str, Any]:
    """Usage as Anthropic counts it: cached tokens are not among those of the input."""
    return {
        "input_tokens": finished.prompt_tokens - finished.cached_tokens,
        "output_tokens": finished.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": finished.cached_tokens,
        "media": usage_of(finished, [reply], chat)["media"],
    }
