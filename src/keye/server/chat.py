"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress, TokenProb
from keye.server.context import Context, context_of, owner_of
from keye.server.json_route import JsonRoute
from keye.server.prepare import Prepared, chat_wanted, prepare, tokens_of
from keye.server.replies import Choice, findings_of, head, prob_object, progress_of, usage_of, whole, written
from keye.server.schemas import ChatRequest
from keye.server.sse import event, streamed, until_gone

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Continues a conversation about text, images and videos; with `stream` as server-sent events."""
    context = context_of(request)
    prepared = await until_gone(request, prepare(context, owner_of(request), chat_wanted(body)))
    if body.stream:
        events = _chunks(context, prepared, body)
        return await streamed(request, events, at_once=body.keye.progress)
    return JSONResponse(await until_gone(request, _whole(context, prepared, body)))


@router.post("/v1/chat/completions/input_tokens")
async def count_tokens(request: Request, body: ChatRequest) -> JSONResponse:
    """How many tokens the prompt of a chat takes. Media are looked into, and not decoded."""
    context = context_of(request)
    context.check_model(body.model)
    count = await until_gone(request, context.decode(tokens_of, context, owner_of(request), chat_wanted(body)))
    return JSONResponse({"object": "chat.completion.input_tokens", "input_tokens": count})


async def _whole(context: Context, prepared: Prepared, body: ChatRequest) -> dict[str, Any]:
    choices, finished = await whole(context, prepared)
    return {
        **head("chatcmpl", "chat.completion", context),
        "choices": [_choice(index, choice, prepared) for index, choice in enumerate(choices)],
        "usage": usage_of(finished, choices, prepared),
        "keye": findings_of(finished, choices[0].text, prepared.notes),
    }


def _choice(index: int, choice: Choice, prepared: Prepared) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, name, arguments in choice.calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": None if prepared.job.logprobs is None else _probs(choice.probs),
        "finish_reason": choice.reason,
    }


def _probs(probs: Sequence[TokenProb]) -> dict[str, Any]:
    return {"content": [prob_object(prob) for prob in probs], "refusal": None}


def _chunks(context: Context, prepared: Prepared, body: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The events of a stream, the last of them with usage and findings where they are asked for."""
    choices = [Choice.of(prepared) for _ in range(prepared.job.n)]
    begin = head("chatcmpl", "chat.completion.chunk", context)
    wants_usage = bool(body.stream_options and body.stream_options.include_usage) or "keye" in body.model_fields_set
    begun: set[int] = set()

    def chunk(index: int, delta: Mapping[str, Any], probs: Sequence[TokenProb] = (), end: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": _probs(probs) if probs else None, "finish_reason": end}
        return event({**begin, "choices": [choice]})

    def told(one: Event) -> Iterator[bytes]:
        if isinstance(one, Delta | Ended) and one.index not in begun:
            begun.add(one.index)
            yield chunk(one.index, {"role": "assistant", "content": None})
        if isinstance(one, Delta):
            deltas = [_delta(choices[one.index], piece) for piece in choices[one.index].add(one)]
            if one.probs and not deltas:
                deltas = [{}]
            for place, delta in enumerate(deltas):
                yield chunk(one.index, delta, one.probs if place == 0 else ())
        elif isinstance(one, Ended):
            for piece in choices[one.index].end(one):
                yield chunk(one.index, _delta(choices[one.index], piece))
            yield chunk(one.index, {}, end=choices[one.index].reason)
        elif isinstance(one, Progress) and body.keye.progress:
            yield event({**begin, "choices": [], "keye": progress_of(one)})
        elif isinstance(one, Finished) and wants_usage:
            findings = findings_of(one, choices[0].text, prepared.notes)
            yield event({**begin, "choices": [], "usage": usage_of(one, choices, prepared), "keye": findings})

    return written(context, prepared.job, told)


def _delta(choice: Choice, piece: ReplyPiece) -> dict[str, Any]:
    """What a piece of a reply adds to a message."""
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.kind == "arguments":
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    number, name, _ = choice.calls[piece.index]
    call = {"index": piece.index, "id": number, "type": "function", "function": {"name": name, "arguments": ""}}
    return {"tool_calls": [call]}
