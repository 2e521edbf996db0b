"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface. A conversation in its blocks becomes the
messages that every other route works with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.stream import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress
from keye.server.context import context_of
from keye.server.edge.audit import new_id
from keye.server.edge.errors import ApiError
from keye.server.errors import add_note
from keye.server.openai.events import ChatReply, collect_chat, encode_events, keye_fields, usage_of
from keye.server.openai.http import JsonRoute, event, stream_events
from keye.server.openai.prepare import ChatQuery, PreparedChat, count_prompt_tokens, prepare_chat, response_form
from keye.server.openai.schemas import CountTokensRequest, MessagesRequest

router = APIRouter(route_class=JsonRoute)

_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
#: Blocks that only their own server understands, and that clients send back with the conversation.
_DROPPED: Final = ("redacted_thinking", "server_tool_use", "web_search_tool_result", "container_upload")


@router.post("/v1/messages")
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Continues a conversation about text, images and videos, in the form of Anthropic's interface."""
    more: dict[str, Any] = {"stop": body.stop_sequences} if body.stop_sequences else {}
    if body.thinking is not None and body.thinking.type != "disabled" and body.thinking_token_budget is None:
        more["thinking_token_budget"] = body.thinking.budget_tokens
    query = replace(_query(body), sampling=body.model_copy(update=more), max_tokens=body.max_tokens)
    chat = await prepare_chat(request, query)
    context = context_of(request)
    model = context.name_of(chat.request.adapter)
    if body.stream:
        events = encode_events(context, (chat.request, MessageEncoder(model, chat).encode))
        return await stream_events(request, events, tail=b"")
    (reply,), finished = await collect_chat(request, chat)
    return JSONResponse(message_object(model, reply, finished, chat))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> JSONResponse:
    """How many tokens a conversation takes as a prompt. Media are probed, and not decoded."""
    return JSONResponse({"input_tokens": await count_prompt_tokens(request, _query(body))})


def _query(body: CountTokensRequest) -> ChatQuery:
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _content("system", body.system)})
    for index, message in enumerate(body.messages):
        messages += _messages(f"messages[{index}]", message)
    choice = body.tool_choice or {}
    inner = body.output_config.format if body.output_config else None
    form = response_form(inner or body.output_format, "output_config.format" if inner else "output_format")
    return ChatQuery(
        messages=messages,
        sampling=body,
        tools=list(_tools(body.tools or ())),
        tool_choice=_tool_choice(choice),
        parallel_calls=choice.get("disable_parallel_tool_use") is not True,
        form=form,
        thinking=None if body.thinking is None else body.thinking.type != "disabled",
        media_defaults=body.preprocess_kwargs,
        continues=messages[-1].get("role") == "assistant" and not messages[-1].get("tool_calls"),
    )


def _content(where: str, value: Any) -> Any:
    """Blocks as parts of a message; a text as it is."""
    if not isinstance(value, list):
        return value
    return [part for index, block in enumerate(value) for part in _parts(f"{where}[{index}]", block)]


def _tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The functions among the tools; those that Anthropic's own server or model brings are left out with a note."""
    for index, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            add_note(f"tools[{index}] of type {str(tool['type'])[:60]!r} is not offered: keye knows functions only")
            continue
        parameters = tool.get("input_schema")
        if not isinstance(parameters, Mapping):
            raise ApiError(400, f"tools[{index}].input_schema: give a JSON schema, an object", param="tools")
        extra = {"description": tool["description"]} if tool.get("description") else {}
        yield {"type": "function", "function": {"name": tool.get("name"), **extra, "parameters": parameters}}


def _tool_choice(choice: Mapping[str, Any]) -> object:
    kind = choice.get("type")
    if not choice or kind in _CHOICES:
        return _CHOICES[str(kind)] if choice else None
    if kind != "tool":
        raise ApiError(400, "tool_choice.type must be auto, any, tool or none", param="tool_choice.type")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _messages(where: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One turn of Anthropic's as messages of ours: results of tools stand in messages of their own, before what the
    user adds to them."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, f"{where}.role must be user or assistant", param=f"{where}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content: give a text or a list of blocks", param=f"{where}.content")
    turn: dict[str, Any] = {"role": role, "content": []}
    results: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        at = f"{where}.content[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result" and role == "user":
            result = _content(f"{at}.content", block.get("content")) or ""
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        elif kind == "tool_use" and role == "assistant":
            call = {"name": block.get("name"), "arguments": block.get("input") or {}}
            turn.setdefault("tool_calls", []).append({"id": block.get("id"), "type": "function", "function": call})
        elif kind == "thinking" and role == "assistant":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + str(block.get("thinking") or "")
        elif kind not in _DROPPED:
            turn["content"] += _parts(at, block)
    if not turn["content"] and (results or "tool_calls" not in turn):
        return results or [{**turn, "content": ""}]
    return [*results, turn]


def _parts(where: str, block: object) -> list[dict[str, Any]]:
    """A block of text, image, video or document as parts of a message."""
    if not isinstance(block, Mapping):
        raise ApiError(400, f"{where}: give a block, an object with a type", param=where)
    kind = block.get("type")
    if kind == "text":
        return [{"type": "text", "text": block.get("text")}]
    if kind in ("image", "video"):
        return [_medium(where, str(kind), block)]
    if kind == "document":
        return _document(where, block)
    raise ApiError(
        400,
        f"{where}.type is {str(kind)[:60]!r}; use text, image, video, tool_use or tool_result",
        param=f"{where}.type",
    )


def _medium(where: str, kind: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """An image, or as our own addition a video: `source` is base64, a URL, or an upload."""
    source = block.get("source")
    if not isinstance(source, Mapping):
        raise ApiError(400, f"{where}.source: give an object of type base64, url or file", param=f"{where}.source")
    form = source.get("type")
    value = source.get({"base64": "data", "url": "url", "file": "file_id"}.get(str(form), ""))
    if not isinstance(value, str):
        raise ApiError(
            400, f"{where}.source must be base64 with data, url with url, or file with file_id", param=f"{where}.source"
        )
    if form == "base64":
        if isinstance(source, dict):
            del source["data"]  # media are not held twice
        value = f"data:{source.get('media_type') or 'application/octet-stream'};base64,{value}"
    own = {key: own for key, own in block.items() if key not in ("type", "source", "cache_control", "title", "context")}
    if form == "file":
        return {"type": f"input_{kind}", "file_id": value, **own}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": value}, **own}


def _document(where: str, block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A document that is plain text, or made of blocks."""
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if isinstance(source, Mapping) and kind == "text":
        return [{"type": "text", "text": source.get("data")}]
    if isinstance(source, Mapping) and kind == "content":
        content = source.get("content")
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if isinstance(content, list):
            return cast(list[dict[str, Any]], _content(f"{where}.source.content", content))
    raise ApiError(400, f"{where}: a document must be plain text; send its pages as images", param=where)


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
        "keye": keye_fields(finished, reply.text, chat),
    }


class MessageEncoder:
    """Encodes the events of one message. One block is open at a time, `_index` is its number."""

    def __init__(self, model: str, chat: PreparedChat) -> None:
        self._model, self._reply, self._chat = model, ChatReply.of(chat), chat
        self._has_begun, self._kind, self._index = False, "", -1

    def encode(self, item: Event) -> Iterator[bytes]:
        prefills = isinstance(item, Progress) and item.phase == "prefill"
        if not self._has_begun and (prefills or isinstance(item, Delta | Ended)):
            # As soon as the length of the prompt is known; cached tokens are reported at the end.
            self._has_begun = True
            usage = {
                "input_tokens": item.total if isinstance(item, Progress) else 0, "output_tokens": 0,
                "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            }  # fmt: skip
            message = {**_begin(self._model), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            yield _event("message_start", message=message)
            yield _event("ping")
        if isinstance(item, Delta | Ended):
            for piece in self._reply.take(item):
                yield from self._piece(piece)
        elif isinstance(item, Finished):
            if self._index < 0:
                yield from self._open("text", {"text": ""})
            yield from self._close()
            usage = _usage(item, self._reply, self._chat)
            fields = keye_fields(item, self._reply.text, self._chat)
            yield _event("message_delta", delta=_end(self._reply), usage=usage, keye=fields)
            yield _event("message_stop")

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
