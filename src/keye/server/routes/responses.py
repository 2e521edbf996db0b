"""POST /v1/responses: a request brings the whole conversation, or what follows a response that was stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.stream import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.audit import new_id
from keye.server.edge.errors import ApiError
from keye.server.openai.events import (
    ChatReply,
    Telemetry,
    collect_chat,
    encode_events,
    keye_fields,
    prob_object,
    usage_of,
)
from keye.server.openai.fields import note_ignored, read_fields
from keye.server.openai.http import JsonRoute, cancel_on_disconnect, event, stream_events
from keye.server.openai.media_parts import media_settings
from keye.server.openai.prepare import (
    ChatQuery,
    PreparedChat,
    check_stream_options,
    count_prompt_tokens,
    form_of,
    prepare_chat,
    response_form,
    thinking_of,
)
from keye.server.openai.schemas import ResponseRequest
from keye.server.stores import StoredResponse, new_response_id

router = APIRouter(route_class=JsonRoute)

_LOGPROBS: Final = "message.output_text.logprobs"
_ITEMS: Final = ("message", "function_call", "function_call_output", "reasoning")


@router.post("/v1/responses")
async def create_response(request: Request, body: ResponseRequest) -> Response:
    """Continues a conversation about text, images and videos, in the form of OpenAI's newer interface."""
    context, owner = context_of(request), owner_of(request)
    history = await _history(request, body)
    chat = await prepare_chat(request, _query(body, history))
    if body.stream:
        return await stream_events(request, _stream(context, owner, chat, body), tail=b"")
    (reply,), finished = await collect_chat(request, chat)
    response = _completed(_head(context, chat, body), reply, finished, chat)
    response["output"] = items_of(reply, response["status"])
    return JSONResponse(await _store(context, owner, body, response))


@router.post("/v1/responses/input_tokens")
async def count_tokens(request: Request, body: ResponseRequest) -> JSONResponse:
    """How many tokens the prompt of a response takes. Media are probed, and not decoded."""
    history = await _history(request, body)
    count = await count_prompt_tokens(request, _query(body, history))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


async def _history(request: Request, body: ResponseRequest) -> Sequence[Mapping[str, Any]]:
    """The items of the conversation that the request follows."""
    if body.previous_response_id is None:
        return ()
    context, owner = context_of(request), owner_of(request)
    most = context.settings.messages
    reading = context.in_thread(context.responses.history, owner, body.previous_response_id, most)
    return await cancel_on_disconnect(request, reading)


def _query(body: ResponseRequest, history: Sequence[Mapping[str, Any]]) -> ChatQuery:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    new = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages += _messages([*history, *new], len(history))
    text = read_fields(body.text or {}, ("format",), where="text.")
    check_stream_options(body.stream, body.stream_options)
    form, other = response_form(text.get("format"), "text.format"), form_of(body)
    if form is not None and other is not None:
        raise ApiError(400, f"text.format and {other.field} exclude each other; give one form", param=other.field)
    include = body.include or []
    if others := [name for name in include if name != _LOGPROBS]:
        note_ignored([f"include {name}" for name in others])
    return ChatQuery(
        messages=messages, sampling=body, max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if _LOGPROBS in include else body.top_logprobs, tools=body.tools or (),
        tool_choice=body.tool_choice, parallel_calls=body.parallel_tool_calls is not False, form=form or other,
        thinking=thinking_of(body.chat_template_kwargs, body.reasoning.effort if body.reasoning else None),
        media_defaults=media_settings(body),
    )  # fmt: skip


def _messages(items: Sequence[Mapping[str, Any]], first: int) -> list[dict[str, Any]]:
    """The items of an input as messages of a chat; calls join the assistant's message before them. The request's own
    begin with number `first`."""
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for index, item in enumerate(items):
        where, kind = f"input[{max(index - first, 0)}]", item.get("type") or "message"
        if kind not in _ITEMS:
            raise ApiError(400, f"{where}.type is {kind!r}; use one of {', '.join(_ITEMS)}", param=f"{where}.type")
        if kind == "reasoning":
            content = item.get("content")  # of an item that an earlier response gave out
            parts = content if isinstance(content, list) else ()
            reasoning = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": "", "tool_calls": []})
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            messages[-1].setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": call})
        else:
            fields = {key: value for key, value in item.items() if key not in ("type", "id", "status", "phase")}
            messages.append({"role": None, **fields})
        if reasoning and messages and messages[-1]["role"] == "assistant" and kind != "reasoning":
            messages[-1]["reasoning_content"], reasoning = reasoning, ""
    return messages


def _head(context: Context, chat: PreparedChat, body: ResponseRequest) -> dict[str, Any]:
    params = chat.request.params
    return {
        "id": new_response_id(), "object": "response", "created_at": int(time.time()),
        "model": context.name_of(chat.request.adapter), "status": "in_progress", "error": None,
        "incomplete_details": None,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False, "store": body.store is not False,
        "previous_response_id": body.previous_response_id,
        "temperature": params.temperature, "top_p": params.top_p, "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [], "text": body.text or {"format": {"type": "text"}}, "truncation": "disabled",
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "metadata": body.metadata or {}, "usage": None,
    }  # fmt: skip


def _completed(head: Mapping[str, Any], reply: ChatReply, finished: Finished, chat: PreparedChat) -> dict[str, Any]:
    usage = usage_of(finished, [reply], chat)
    cut = reply.reason == "length"
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": {
            "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens_details": usage["completion_tokens_details"], "media": usage["media"],
        },
        "keye": keye_fields(finished, reply.text, chat),
    }  # fmt: skip


async def _store(context: Context, owner: str, body: ResponseRequest, response: dict[str, Any]) -> dict[str, Any]:
    """The complete response, stored unless the client declines; a note says where there was no room for it."""
    if body.store is False:
        return response
    stored = StoredResponse(response, _items_with_ids(body.input))
    if await context.in_thread(context.responses.keep, owner, stored):
        return response
    notes = [*response["keye"].get("notes", ()), "store: there was no room for this response, so it was not stored"]
    return {**response, "store": False, "keye": {**response["keye"], "notes": notes}}


async def _stream(
    context: Context, owner: str, chat: PreparedChat, body: ResponseRequest
) -> AsyncGenerator[bytes, None]:
    encoder = _Encoder(_head(context, chat, body), chat, body)
    async with aclosing(encode_events(context, (chat.request, encoder.encode))) as pieces:
        async for piece in pieces:
            yield piece
    # Stored before the last event is sent: the client may refer to the response at once.
    yield encoder.last_event(await _store(context, owner, body, encoder.response))


class _Encoder:
    """Encodes the events of one response, in which one item is open at a time. `response` is complete when the engine
    has finished."""

    def __init__(self, head: dict[str, Any], chat: PreparedChat, body: ResponseRequest) -> None:
        self._chat, self._reply, self.response = chat, ChatReply.of(chat), head
        self._telemetry = Telemetry(body.timings_per_token, body.return_progress)
        self._number, self._text = 0, ""
        self._open: dict[str, Any] | None = None
        self._items: list[dict[str, Any]] = []

    def encode(self, item: Event) -> Iterator[bytes]:
        self._telemetry.see(item)
        steps = list(self._telemetry.progress(item)) if isinstance(item, Progress) else []
        if (isinstance(item, Delta | Ended) or steps) and not self._number:
            for kind in ("created", "in_progress"):
                yield self._event(f"response.{kind}", response=self.response)
        for step in steps:
            yield self._event("response.in_progress", response=self.response, **step)
        if isinstance(item, Delta | Ended):
            for piece in self._reply.take(item):
                yield from self._piece(piece)
        if isinstance(item, Ended):
            if self._open is None and not self._items:  # a reply of nothing has one empty message
                yield from self._open_item("message")
            yield from self._close_item()
        elif isinstance(item, Finished):
            self.response = {**_completed(self.response, self._reply, item, self._chat), "output": self._items}

    def last_event(self, stored: dict[str, Any]) -> bytes:
        return self._event(f"response.{stored['status']}", response=stored, **self._telemetry.timings())

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _piece(self, piece: ReplyPiece) -> Iterator[bytes]:
        """The events of one piece of the reply; a piece of another kind closes the item before it."""
        if piece.kind == "call":
            yield from self._close_item()
            number, name, _ = self._reply.calls[piece.index]
            yield from self._open_item("function_call", call_id=number, name=name, arguments="")
            return
        kind = _KIND[piece.kind]
        if self._open is None or self._open["type"] != kind:
            yield from self._close_item()
            yield from self._open_item(kind)
        self._text += piece.text
        fields = {**self._place(), "delta": piece.text, **self._telemetry.timings()}
        yield self._event(f"response.{_DELTA[kind]}.delta", **fields)

    def _place(self) -> dict[str, Any]:
        """Where the text of the open item stands."""
        assert self._open is not None
        place, kind = {"item_id": self._open["id"], "output_index": len(self._items)}, self._open["type"]
        if kind == "function_call":
            return place
        return {**place, "content_index": 0, **({"logprobs": []} if kind == "message" else {})}

    def _part_event(self, name: str) -> bytes:
        place = {key: value for key, value in self._place().items() if key != "logprobs"}
        return self._event(f"response.content_part.{name}", **place, part=self._part())

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        is_reasoning = self._open["type"] == "reasoning"
        return {"type": "reasoning_text", "text": self._text} if is_reasoning else _text_part(self._text)

    def _open_item(self, kind: Kind, **fields: Any) -> Iterator[bytes]:
        self._open, self._text = _new(kind, "in_progress") | fields, ""
        yield self._event("response.output_item.added", output_index=len(self._items), item=self._open)
        if kind != "function_call":
            yield self._part_event("added")

    def _close_item(self) -> Iterator[bytes]:
        if self._open is None:
            return
        kind: Kind = self._open["type"]
        if kind == "function_call":
            content: dict[str, Any] = {"arguments": self._text}
            fields = {"name": self._open["name"], **content}
        else:
            content, fields = {"content": [self._part()]}, {"text": self._text}
        done = {**self._open, "status": "completed", **content}
        yield self._event(f"response.{_DELTA[kind]}.done", **self._place(), **fields)
        if kind != "function_call":
            yield self._part_event("done")
        yield self._event("response.output_item.done", output_index=len(self._items), item=done)
        self._items.append(done)
        self._open = None


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str) -> JSONResponse:
    """A response as it was returned."""
    context = context_of(request)
    stored = await context.in_thread(context.responses.get, owner_of(request), response_id)
    return JSONResponse(stored.response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> JSONResponse:
    """Removes a response; those that follow it cannot be continued any more."""
    context = context_of(request)
    await context.in_thread(context.responses.delete, owner_of(request), response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items")
async def input_items(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=256)] = None,
) -> JSONResponse:
    """The input of a response, from `after` on, at most `limit` of its items."""
    context = context_of(request)
    stored = await context.in_thread(context.responses.get, owner_of(request), response_id)
    items = list(stored.items) if order == "asc" else list(reversed(stored.items))
    if after is not None:
        at = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise ApiError(404, "after: the response has no item of this id", param="after", code="not_found")
        items = items[at + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


def _items_with_ids(value: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The input of a request as items, each with an id, as they are stored."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    items = []
    for item in value:
        kind = item.get("type") or "message"
        prefix = {"message": "msg_", "function_call": "fc_", "reasoning": "rs_"}.get(str(kind), "item_")
        stored = {"type": kind, **item}
        if not isinstance(stored.get("id"), str):
            stored["id"] = new_id(prefix)
        if kind == "message" and isinstance(stored.get("content"), str):
            part = "output_text" if stored.get("role") == "assistant" else "input_text"
            stored["content"] = [{"type": part, "text": stored["content"]}]
        items.append(stored)
    return items


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
    item: dict[str, Any] = {"id": new_id(f"{_PREFIX[kind]}_"), "type": kind, "status": status}
    if kind == "message":
        return item | {"role": "assistant", "content": []}
    return item | {"summary": [], "content": []} if kind == "reasoning" else item


def _text_part(text: str, reply: ChatReply | None = None) -> dict[str, Any]:
    probs = [prob_object(prob) for prob in reply.probs] if reply is not None else []
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": probs}
