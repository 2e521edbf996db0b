"""A reply as Anthropic's clients read it: the message, and the events in which it is written."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Final

from keye.chat.stream import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress
from keye.server.context import Context
from keye.server.edge.ids import new_id
from keye.server.openai.events import Choice, findings_of, usage_of, written
from keye.server.openai.prepare import Prepared
from keye.server.openai.sse import event

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_BLOCKS: Final = {"reasoning": "thinking", "content": "text", "arguments": "tool_use"}
#: Of each kind of block the kind of its deltas, and the field that holds what is added.
_DELTAS: Final = {
    "thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}  # fmt: skip


def message_object(model: str, choice: Choice, finished: Finished, prepared: Prepared) -> dict[str, Any]:
    """A finished reply."""
    content: list[dict[str, Any]] = []
    if choice.reasoning:
        content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
    if choice.text or not choice.calls:
        content.append({"type": "text", "text": choice.text})
    content += [
        {"type": "tool_use", "id": _tool_id(number), "name": name, "input": _arguments(arguments)}
        for number, name, arguments in choice.calls
    ]
    return {
        **_begin(model),
        "content": content,
        **_end(choice),
        "usage": _usage(finished, choice, prepared),
        "keye": findings_of(finished, choice.text, prepared.notes),
    }


def stream_message(context: Context, prepared: Prepared) -> AsyncGenerator[bytes, None]:
    """The events of a reply."""
    writer = _Writer(context.name, Choice.of(prepared), prepared)
    return written(context, prepared.job, writer.write)


class _Writer:
    """Writes the events of one message. One block is open at a time, and `_index` is its number."""

    def __init__(self, model: str, choice: Choice, prepared: Prepared) -> None:
        self._model, self._choice, self._prepared = model, choice, prepared
        self._begun, self._kind, self._index = False, "", -1

    def write(self, one: Event) -> Iterator[bytes]:
        if isinstance(one, Progress) and one.phase == "prefill":
            yield from self._start(one.total)
        elif isinstance(one, Delta | Ended):
            yield from self._start(0)
            for piece in self._choice.add(one) if isinstance(one, Delta) else self._choice.end(one):
                yield from self._piece(piece)
        elif isinstance(one, Finished):
            if self._index < 0:
                yield from self._open("text", {"text": ""})
            yield from self._close()
            usage = _usage(one, self._choice, self._prepared)
            findings = findings_of(one, self._choice.text, self._prepared.notes)
            yield _event("message_delta", delta=_end(self._choice), usage=usage, keye=findings)
            yield _event("message_stop")

    def _start(self, tokens: int) -> Iterator[bytes]:
        """The beginning, as soon as the length of the prompt is known: what of it was cached is told at the end."""
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
            number, name, _ = self._choice.calls[piece.index]
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


def _end(choice: Choice) -> dict[str, Any]:
    ended = choice.ended
    if ended is not None and ended.asked and isinstance(ended.met, str) and choice.reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": ended.met}
    return {"stop_reason": _REASONS.get(str(choice.reason), "end_turn"), "stop_sequence": None}


def _tool_id(number: str) -> str:
    return f"toolu_{number.removeprefix('call_')}"


def _arguments(text: str) -> Any:
    """The arguments of a call; of one that was cut short what its text is worth: nothing."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _usage(finished: Finished, choice: Choice, prepared: Prepared) -> dict[str, Any]:
    """Usage as Anthropic counts: what came from a cache is not among the tokens of the input."""
    return {
        "input_tokens": finished.prompt_tokens - finished.cached_tokens,
        "output_tokens": finished.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": finished.cached_tokens,
        "media": usage_of(finished, [choice], prepared)["media"],
    }
