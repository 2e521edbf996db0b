"""POST /v1/responses: a request brings the whole conversation, or what follows a response that was stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.engine.guide import Form
from keye.engine.request import Delta, Ended, Event, Finished, Progress
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.openai.events import Choice, findings_of, usage_of, whole, written
from keye.server.openai.fields import note_ignored, read_fields
from keye.server.openai.forms import form_of, response_form
from keye.server.openai.media_settings import media_settings
from keye.server.openai.prepare import Prepared, Wanted, check_stream_options, prepare, thinking_of, tokens_of
from keye.server.openai.response_events import ResponseWriter, items_of
from keye.server.openai.schemas import ResponseRequest
from keye.server.openai.sse import streamed, until_gone
from keye.server.openai.telemetry import Telemetry
from keye.server.response_store import Kept, new_response_id
from keye.server.routes.json_route import JsonRoute
from keye.server.routes.response_items import items_with_ids

router = APIRouter(route_class=JsonRoute)

_LOGPROBS: Final = "message.output_text.logprobs"
_ITEMS: Final = ("message", "function_call", "function_call_output", "reasoning")


@router.post("/v1/responses")
async def create_response(request: Request, body: ResponseRequest) -> Response:
    """Continues a conversation about text, images and videos, in the form of OpenAI's newer interface."""
    context, owner = context_of(request), owner_of(request)
    before = await until_gone(request, _before(context, owner, body))
    prepared = await until_gone(request, prepare(context, owner, _wanted(body, before)))
    if body.stream:
        return await streamed(request, _events(context, owner, prepared, body), tail=b"")
    return JSONResponse(await until_gone(request, _whole(context, owner, prepared, body)))


@router.post("/v1/responses/input_tokens")
async def count_tokens(request: Request, body: ResponseRequest) -> JSONResponse:
    """How many tokens the prompt of a response takes. Media are looked into, and not decoded."""
    context, owner = context_of(request), owner_of(request)
    before = await until_gone(request, _before(context, owner, body))
    context.check_model(body.model)
    count = await until_gone(request, context.decode(tokens_of, context, owner, _wanted(body, before)))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


async def _before(context: Context, owner: str, body: ResponseRequest) -> Sequence[Mapping[str, Any]]:
    """The items of the conversation that the request follows."""
    if body.previous_response_id is None:
        return ()
    return await context.in_thread(
        context.responses.history, owner, body.previous_response_id, context.settings.messages
    )


def _wanted(body: ResponseRequest, before: Sequence[Mapping[str, Any]] = ()) -> Wanted:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    new = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages += _messages([*before, *new], len(before))
    text = read_fields(body.text or {}, ("format",), where="text.")
    check_stream_options(body.stream, body.stream_options)
    return Wanted(
        messages=messages,
        sampling=body,
        max_tokens=body.max_output_tokens,
        logprobs=_alternatives(body),
        tools=body.tools or (),
        tool_choice=body.tool_choice,
        several_calls=body.parallel_tool_calls is not False,
        form=_form(body, text.get("format")),
        thinking=thinking_of(body.chat_template_kwargs, body.reasoning.effort if body.reasoning else None),
        media_defaults=media_settings(body),
    )


def _form(body: ResponseRequest, value: object) -> Form | None:
    """The form of the reply, in OpenAI's field or in one of other servers."""
    form, other = response_form(value, "text.format"), form_of(body)
    if form is not None and other is not None:
        raise ApiError(400, f"text.format and {other.field} exclude each other; give one form", param=other.field)
    return form or other


def _alternatives(body: ResponseRequest) -> int | None:
    """How many other tokens are told beside each; what else `include` asks for is not there, and noted."""
    include = body.include or []
    if others := [name for name in include if name != _LOGPROBS]:
        note_ignored([f"include {name}" for name in others])
    return (body.top_logprobs or 0) if _LOGPROBS in include else body.top_logprobs


def _messages(items: Sequence[Mapping[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    """The items of an input as messages of a chat; calls join the assistant's message before them. The request's own
    begin with number `first`."""
    messages: list[dict[str, Any]] = []
    thought = ""
    for index, item in enumerate(items):
        where, kind = f"input[{max(index - first, 0)}]", item.get("type") or "message"
        if kind not in _ITEMS:
            raise ApiError(400, f"{where}.type is {kind!r}; use one of {', '.join(_ITEMS)}", param=f"{where}.type")
        if kind == "reasoning":
            thought = _thought(item)
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
        if thought and messages and messages[-1]["role"] == "assistant" and kind != "reasoning":
            messages[-1]["reasoning_content"], thought = thought, ""
    return messages


def _thought(item: Mapping[str, Any]) -> str:
    """The text of an item of reasoning that an earlier response gave out."""
    content = item.get("content") or ()
    parts = content if isinstance(content, list) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _head(context: Context, prepared: Prepared, body: ResponseRequest) -> dict[str, Any]:
    """The response object before it has any output."""
    params = prepared.job.params
    return {
        "id": new_response_id(), "object": "response", "created_at": int(time.time()),
        "model": context.name, "status": "in_progress", "error": None, "incomplete_details": None,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False, "store": body.store is not False,
        "previous_response_id": body.previous_response_id,
        "temperature": params.temperature, "top_p": params.top_p, "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [], "text": body.text or {"format": {"type": "text"}}, "truncation": "disabled",
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "metadata": body.metadata or {}, "usage": None,
    }  # fmt: skip


def _completed(head: Mapping[str, Any], choice: Choice, finished: Finished, prepared: Prepared) -> dict[str, Any]:
    """The response object with its output and its usage."""
    usage = usage_of(finished, [choice], prepared)
    cut = choice.reason == "length"
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": {
            "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens_details": usage["completion_tokens_details"], "media": usage["media"],
        },
        "keye": findings_of(finished, choice.text, prepared.notes),
    }  # fmt: skip


async def _kept(context: Context, owner: str, body: ResponseRequest, complete: dict[str, Any]) -> dict[str, Any]:
    """The complete response, stored if that is wanted; a note says where there was no room for it."""
    if body.store is False:
        return complete

    def keep() -> bool:
        return context.responses.keep(owner, Kept(complete, items_with_ids(body.input)))

    if await context.in_thread(keep):
        return complete
    notes = [*complete["keye"].get("notes", ()), "store: there was no room for this response, so it was not stored"]
    return {**complete, "store": False, "keye": {**complete["keye"], "notes": notes}}


async def _whole(context: Context, owner: str, prepared: Prepared, body: ResponseRequest) -> dict[str, Any]:
    (choice,), finished = await whole(context, prepared)
    complete = _completed(_head(context, prepared, body), choice, finished, prepared)
    complete["output"] = items_of(choice, complete["status"])
    return await _kept(context, owner, body, complete)


async def _events(
    context: Context, owner: str, prepared: Prepared, body: ResponseRequest
) -> AsyncGenerator[bytes, None]:
    choice, head = Choice.of(prepared), _head(context, prepared, body)
    writer, telemetry = ResponseWriter(choice), Telemetry(body.timings_per_token, body.return_progress)
    complete: dict[str, Any] = {}

    def told(one: Event) -> Iterator[bytes]:
        telemetry.see(one)
        steps = list(telemetry.progress(one)) if isinstance(one, Progress) else []
        if (isinstance(one, Delta | Ended) or steps) and not writer.begun:
            for kind in ("created", "in_progress"):
                yield writer.event(f"response.{kind}", response=head)
        for step in steps:
            yield writer.event("response.in_progress", response=head, **step)
        if isinstance(one, Delta | Ended):
            for piece in choice.add(one) if isinstance(one, Delta) else choice.end(one):
                yield from writer.piece(piece, telemetry.timings())
        if isinstance(one, Ended):
            yield from writer.close()
        elif isinstance(one, Finished):
            complete.update(_completed(head, choice, one, prepared), output=writer.items)

    async with aclosing(written(context, prepared.job, told)) as pieces:
        async for piece in pieces:
            yield piece
    # Who reads the last event may refer to the response at once.
    stored = await _kept(context, owner, body, complete)
    yield writer.event(f"response.{stored['status']}", response=stored, **telemetry.timings())
