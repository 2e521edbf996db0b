"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.stream import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress, TokenProb
from keye.server.context import Context, context_of, owner_of
from keye.server.openai.events import (
    Choice,
    RunningUsage,
    findings_of,
    head,
    prob_object,
    progress_of,
    prompt_probs_of,
    stop_of,
    usage_of,
    whole,
    written,
)
from keye.server.openai.prepare import Prepared, chat_wanted, prepare, text_of, tokens_of
from keye.server.openai.schemas import ChatRequest, KeyeFields
from keye.server.openai.sse import event, streamed, until_gone
from keye.server.openai.telemetry import Telemetry
from keye.server.routes.json_route import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Continues a conversation about text, images and videos; with `stream` as server-sent events."""
    context = context_of(request)
    prepared = await until_gone(request, prepare(context, owner_of(request), chat_wanted(body)))
    if body.stream:
        events = _chunks(context, prepared, body)
        return await streamed(request, events, at_once=_own(body).progress)
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
        "choices": [_choice(index, choice, prepared, body) for index, choice in enumerate(choices)],
        "usage": usage_of(finished, choices, prepared),
        **_prompt_fields(finished, prepared, body),
        "keye": findings_of(finished, choices[0].text, prepared.notes),
    }


def _prompt_fields(finished: Finished, prepared: Prepared, body: ChatRequest) -> dict[str, Any]:
    """What was asked for about the prompt."""
    found: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_probs_of(finished.prompt_probs)
    if body.return_token_ids:
        found["prompt_token_ids"] = finished.prompt.token_ids.tolist()
    if body.verbose:
        found["__verbose"] = {"prompt": text_of(prepared.prompt)}
    return found


def _choice(index: int, choice: Choice, prepared: Prepared, body: ChatRequest) -> dict[str, Any]:
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
        **stop_of(choice.ended),
        **({"token_ids": choice.tokens} if body.return_token_ids else {}),
    }


def _probs(probs: Sequence[TokenProb]) -> dict[str, Any]:
    return {"content": [prob_object(prob) for prob in probs], "refusal": None}


def _chunks(context: Context, prepared: Prepared, body: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The events of a stream, the last of them with usage and findings where they are asked for."""
    choices = [Choice.of(prepared) for _ in range(prepared.job.n)]
    options, begun = body.stream_options, set[int]()
    begin = head("chatcmpl", "chat.completion.chunk", context)
    count = RunningUsage(bool(options and options.continuous_usage_stats))
    telemetry = Telemetry(body.timings_per_token, body.return_progress)
    wants_usage = bool(options and (options.include_usage or options.continuous_usage_stats))

    tells_more = wants_usage or _tells_more(body)
    ends: list[Ended] = []

    def chunk(index: int, delta: Mapping[str, Any], more: Mapping[str, Any]) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**begin, "choices": [choice], **count.fields(), **telemetry.timings()})

    def last_chunk(end: Ended, notes: Sequence[str] = ()) -> bytes:
        choice: dict[str, Any] = {"index": end.index, "delta": {}, "logprobs": None}
        choice |= {"finish_reason": choices[end.index].reason, **stop_of(end)}
        own = {"keye": {"notes": notes}} if notes else {}
        return event({**begin, "choices": [choice], **count.fields(), **telemetry.timings(), **own})

    def told(one: Event) -> Iterator[bytes]:
        count.see(one)
        if isinstance(one, Delta | Ended) and one.index not in begun:
            begun.add(one.index)
            yield chunk(one.index, {"role": "assistant", "content": None}, {})
        telemetry.see(one)
        if isinstance(one, Delta):
            deltas = [_delta(choices[one.index], piece) for piece in choices[one.index].add(one)]
            more: dict[str, Any] = {"logprobs": _probs(one.probs)} if one.probs else {}
            if body.return_token_ids and one.tokens:
                more["token_ids"] = list(one.tokens)
            for delta in deltas or ([{}] if more else []):
                yield chunk(one.index, delta, more)
                more = {"logprobs": _probs(())} if one.probs else {}
        elif isinstance(one, Ended):
            for piece in choices[one.index].end(one):
                yield chunk(one.index, _delta(choices[one.index], piece), {})
            ends.append(one)
            if len(ends) < len(choices):  # what the last one tells is known when all is finished
                yield last_chunk(one)
        elif isinstance(one, Progress):
            if _own(body).progress:
                yield event({**begin, "choices": [], "keye": progress_of(one)})
            yield from (event({**begin, "choices": [], **told}) for told in telemetry.progress(one))
        elif isinstance(one, Finished):
            findings = findings_of(one, choices[0].text, prepared.notes)
            yield last_chunk(ends[-1], () if tells_more else findings.get("notes", ()))
            if tells_more:
                usage = usage_of(one, choices, prepared)
                last = {"usage": usage, **_prompt_fields(one, prepared, body), "keye": findings}
                yield event({**begin, "choices": [], **last, **telemetry.timings()})

    return written(context, prepared.job, told)


def _own(body: ChatRequest) -> KeyeFields:
    return body.keye or KeyeFields()


def _tells_more(body: ChatRequest) -> bool:
    """Whether a stream has more to say at its end than its usage."""
    asked = (body.return_token_ids, body.verbose)
    return body.keye is not None or body.prompt_logprobs is not None or any(asked)


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
