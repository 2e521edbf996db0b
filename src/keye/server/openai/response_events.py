"""The items of a response and the events of its stream, as the official client expects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from keye.chat.stream import ReplyPiece
from keye.server.edge.ids import new_id
from keye.server.openai.events import ChatReply, prob_object
from keye.server.openai.http import event

_NOTHING: Final[Mapping[str, Any]] = {}
Kind = Literal["reasoning", "message", "function_call"]
_PREFIX: Final[dict[Kind, str]] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_KIND: Final[dict[str, Kind]] = {"reasoning": "reasoning", "content": "message", "arguments": "function_call"}
#: What the text of an item is called in the names of events.
_DELTA: Final[dict[Kind, str]] = {
    "reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments",
}  # fmt: skip


def items_of(reply: ChatReply, status: str) -> list[dict[str, Any]]:
    """The items of a finished reply."""
    items = []
    if reply.reasoning:
        items.append(_new("reasoning", status) | {"content": [{"type": "reasoning_text", "text": reply.reasoning}]})
    if reply.text or not reply.calls:
        items.append(_new("message", status) | {"content": [_text_part(reply.text, reply)]})
    items += [
        _new("function_call", status) | {"call_id": number, "name": name, "arguments": arguments}
        for number, name, arguments in reply.calls
    ]
    return items


def _new(kind: Kind, status: str) -> dict[str, Any]:
    """An item without its content."""
    item: dict[str, Any] = {"id": new_id(f"{_PREFIX[kind]}_"), "type": kind, "status": status}
    if kind == "message":
        return item | {"role": "assistant", "content": []}
    return item | {"summary": [], "content": []} if kind == "reasoning" else item


def _text_part(text: str, reply: ChatReply | None = None) -> dict[str, Any]:
    probs = [prob_object(prob) for prob in reply.probs] if reply is not None else []
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": probs}


def _within(kind: Kind) -> dict[str, Any]:
    """Where in an item its text stands."""
    if kind == "function_call":
        return {}
    return {"content_index": 0, "logprobs": []} if kind == "message" else {"content_index": 0}


class ResponseWriter:
    """Writes the events of one response; `items` are those that are complete."""

    def __init__(self, reply: ChatReply) -> None:
        self._reply = reply
        self._number = 0
        self._open: dict[str, Any] | None = None
        self._text = ""
        self.items: list[dict[str, Any]] = []

    @property
    def has_begun(self) -> bool:
        return self._number > 0

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event with the next number."""
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def piece(self, piece: ReplyPiece, more: Mapping[str, Any] = _NOTHING) -> Iterator[bytes]:
        """The events of one piece of the reply; a piece of another kind closes the item before it. `more` are further
        fields of its delta."""
        if piece.kind == "call":
            yield from self._close_item()
            number, name, _ = self._reply.calls[piece.index]
            yield from self._open_item("function_call", {"call_id": number, "name": name, "arguments": ""})
            return
        kind = _KIND[piece.kind]
        if self._open is None or self._open["type"] != kind:
            yield from self._close_item()
            yield from self._open_item(kind, {})
        self._text += piece.text
        yield self.event(f"response.{_DELTA[kind]}.delta", **self._place(), **_within(kind), delta=piece.text, **more)

    def close(self) -> Iterator[bytes]:
        """The end of the last item; a reply of nothing has one empty message."""
        if self._open is None and not self.items:
            yield from self._open_item("message", {})
        yield from self._close_item()

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.items)}

    def _open_item(self, kind: Kind, fields: dict[str, Any]) -> Iterator[bytes]:
        self._open, self._text = _new(kind, "in_progress") | fields, ""
        yield self.event("response.output_item.added", output_index=len(self.items), item=self._open)
        if kind != "function_call":
            yield self.event("response.content_part.added", **self._place(), content_index=0, part=self._part())

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return _text_part(self._text)

    def _close_item(self) -> Iterator[bytes]:
        if self._open is None:
            return
        kind: Kind = self._open["type"]
        if kind == "function_call":
            done = {**self._open, "status": "completed", "arguments": self._text}
            fields: dict[str, Any] = {"name": done["name"], "arguments": self._text}
        else:
            done = {**self._open, "status": "completed", "content": [self._part()]}
            fields = {**_within(kind), "text": self._text}
        yield self.event(f"response.{_DELTA[kind]}.done", **self._place(), **fields)
        if kind != "function_call":
            yield self.event("response.content_part.done", **self._place(), content_index=0, part=self._part())
        yield self.event("response.output_item.done", output_index=len(self.items), item=done)
        self.items.append(done)
        self._open = None
