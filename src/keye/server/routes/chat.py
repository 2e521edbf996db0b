"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.stream import ReplyPiece
from keye.engine.request import Delta, Ended, Event, Finished, Progress, TokenProb
from keye.server.context import Context, context_of
from keye.server.edge.errors import ApiError
from keye.server.openai.events import (
    ChatReply,
    RunningUsage,
    Telemetry,
    collect_chat,
    encode_events,
    keye_fields,
    prob_object,
    progress_fields,
    prompt_prob_objects,
    reply_head,
    stop_fields,
    usage_of,
)
from keye.server.openai.http import JsonRoute, event, stream_events
from keye.server.openai.media_parts import media_settings
from keye.server.openai.prepare import (
    ChatQuery,
    PreparedChat,
    check_stream_options,
    count_prompt_tokens,
    form_of,
    prepare_chat,
    thinking_of,
)
from keye.server.openai.schemas import ChatRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Continues a conversation about text, images and videos; with `stream` as server-sent events."""
    context = context_of(request)
    chat = await prepare_chat(request, _query(body))
    if body.stream:
        encoder = _ChunkEncoder(context, chat, body)
        events = encode_events(context, (chat.request, encoder.encode))
        return await stream_events(request, events, at_once=encoder.wants_progress)
    replies, finished = await collect_chat(request, chat)
    return JSONResponse({
        **reply_head("chatcmpl", "chat.completion", context, chat.request.adapter),
        "choices": [_choice(index, reply, chat, body) for index, reply in enumerate(replies)],
        "usage": usage_of(finished, replies, chat),
        **_prompt_fields(finished, chat, body),
        "keye": keye_fields(finished, replies[0].text, chat),
    })  # fmt: skip


@router.post("/v1/chat/completions/input_tokens")
async def count_tokens(request: Request, body: ChatRequest) -> JSONResponse:
    """How many tokens the prompt of a chat takes. Media are probed, and not decoded."""
    count = await count_prompt_tokens(request, _query(body))
    return JSONResponse({"object": "chat.completion.input_tokens", "input_tokens": count})


def _query(body: ChatRequest) -> ChatQuery:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message excludes add_generation_prompt: a message that goes on does not begin"
        raise ApiError(400, message, param="continue_final_message")
    check_stream_options(body.stream, body.stream_options)
    switch = body.thinking.get("type") == "enabled" if isinstance(body.thinking, dict) else body.thinking
    switch = switch if body.enable_thinking is None else body.enable_thinking
    thinking = thinking_of(body.chat_template_kwargs, None if switch is not None else body.reasoning_effort)
    apart = "inside" if body.separate_reasoning is False else "apart"
    return ChatQuery(
        messages=body.messages,
        sampling=body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tools=body.tools or (),
        tool_choice=body.tool_choice,
        parallel_calls=body.parallel_tool_calls is not False,
        form=form_of(body),
        thinking=switch if thinking is None else thinking,
        media_defaults=media_settings(body),
        evidence=body.keye is not None and body.keye.evidence,
        prompt_logprobs=body.prompt_logprobs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continues=bool(body.continue_final_message),
        echo=bool(body.echo),
        reasoning_place="nowhere" if body.include_reasoning is False else apart,  # type: ignore[arg-type]
    )


def _prompt_fields(finished: Finished, chat: PreparedChat, body: ChatRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_prob_objects(finished.prompt_probs)
    if body.return_token_ids:
        fields["prompt_token_ids"] = finished.prompt.token_ids.tolist()
    if body.verbose:
        # One pad token stands for each medium.
        texts = [part.value if isinstance(part.value, str) else f"<|{part.kind}_pad|>" for part in chat.prompt]
        fields["__verbose"] = {"prompt": "".join(texts)}
    return fields


def _choice(index: int, reply: ChatReply, chat: PreparedChat, body: ChatRequest) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in reply.calls
        ]
    return {
        "index": index, "message": message, "logprobs": None if chat.request.logprobs is None else _probs(reply.probs),
        "finish_reason": reply.reason, **stop_fields(reply.ended),
        **({"token_ids": reply.tokens} if body.return_token_ids else {}),
    }  # fmt: skip


def _probs(probs: Sequence[TokenProb]) -> dict[str, Any]:
    return {"content": [prob_object(prob) for prob in probs], "refusal": None}


class _ChunkEncoder:
    """Encodes the events of a chat as chunks, the last with usage and keye's fields where they were requested."""

    def __init__(self, context: Context, chat: PreparedChat, body: ChatRequest) -> None:
        self._chat, self._body = chat, body
        self._begin = reply_head("chatcmpl", "chat.completion.chunk", context, chat.request.adapter)
        self._replies = [ChatReply.of(chat) for _ in range(chat.request.n)]
        self._begun: set[int] = set()
        self._ends: list[Ended] = []
        options = body.stream_options
        in_chunks = bool(options and options.continuous_usage_stats)
        self._usage = RunningUsage(in_chunks)
        self._telemetry = Telemetry(body.timings_per_token, body.return_progress)
        self.wants_progress = body.keye is not None and body.keye.progress
        extras = (in_chunks, options and options.include_usage, body.keye, body.return_token_ids, body.verbose)
        #: Whether a chunk follows that of the last choice.
        self._has_tail = any(extras) or body.prompt_logprobs is not None

    def encode(self, item: Event) -> Iterator[bytes]:
        self._usage.see(item)
        if isinstance(item, Delta | Ended) and item.choice_index not in self._begun:
            self._begun.add(item.choice_index)
            yield self._chunk(item.choice_index, {"role": "assistant", "content": None})
        self._telemetry.see(item)
        if isinstance(item, Delta):
            reply = self._replies[item.choice_index]
            deltas = [_delta(reply, piece) for piece in reply.take(item)]
            more: dict[str, Any] = {"logprobs": _probs(item.probs)} if item.probs else {}
            if self._body.return_token_ids and item.tokens:
                more["token_ids"] = list(item.tokens)
            for fields in deltas or ([{}] if more else []):
                yield self._chunk(item.choice_index, fields, more)
                more = {"logprobs": _probs(())} if item.probs else {}
        elif isinstance(item, Ended):
            for piece in self._replies[item.choice_index].take(item):
                yield self._chunk(item.choice_index, _delta(self._replies[item.choice_index], piece))
            self._ends.append(item)
            if len(self._ends) < len(self._replies):  # the last item waits for the notes of `Finished`
                yield self._last_chunk(item)
        elif isinstance(item, Progress):
            if self.wants_progress:
                yield event({**self._begin, "choices": [], "keye": progress_fields(item)})
            yield from (event({**self._begin, "choices": [], **step}) for step in self._telemetry.progress(item))
        elif isinstance(item, Finished):
            fields = keye_fields(item, self._replies[0].text, self._chat)
            yield self._last_chunk(self._ends[-1], () if self._has_tail else fields.get("notes", ()))
            if self._has_tail:
                usage = usage_of(item, self._replies, self._chat)
                tail = {"usage": usage, **_prompt_fields(item, self._chat, self._body), "keye": fields}
                yield event({**self._begin, "choices": [], **tail, **self._telemetry.timings()})

    def _chunk(
        self, index: int, delta: Mapping[str, Any], more: Mapping[str, Any] = MappingProxyType({}), **own: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**self._begin, "choices": [choice], **self._usage.fields(), **self._telemetry.timings(), **own})

    def _last_chunk(self, end: Ended, notes: Sequence[str] = ()) -> bytes:
        more = {"finish_reason": self._replies[end.choice_index].reason, **stop_fields(end)}
        return self._chunk(end.choice_index, {}, more, **({"keye": {"notes": notes}} if notes else {}))


def _delta(reply: ChatReply, piece: ReplyPiece) -> dict[str, Any]:
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.kind == "arguments":
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    call_id, name, _ = reply.calls[piece.index]
    call = {"index": piece.index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    return {"tool_calls": [call]}
