"""POST /v1/completions: text goes on, without a chat template. The old form, which many tools still use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat import Segment
from keye.engine.request import Delta, Ended, Event, Finished, TokenProb
from keye.engine.request import Request as Job
from keye.server.context import Context, context_of, owner_of
from keye.server.errors import ApiError
from keye.server.json_route import JsonRoute
from keye.server.prepare import form_of, guide_of, job_of
from keye.server.replies import each, head, written
from keye.server.schemas import CompletionRequest
from keye.server.sse import event, streamed, until_gone
from keye.tokenizer import check_unicode

router = APIRouter(route_class=JsonRoute)


@dataclass
class _Text:
    """One choice while it grows."""

    text: str
    probs: list[TokenProb] = field(default_factory=list)
    reason: str | None = None


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues each text; special tokens written in it are plain text."""
    context = context_of(request)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    jobs = await until_gone(request, context.in_thread(_jobs, context, owner_of(request), body, prompts))
    if body.stream:
        events = _chunks(context, jobs, prompts, body)
        return await streamed(request, events)
    return JSONResponse(await until_gone(request, _whole(context, jobs, prompts, body)))


def _jobs(context: Context, owner: str, body: CompletionRequest, prompts: Sequence[str]) -> list[Job]:
    context.check_model(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of must equal n: every reply is returned", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo cannot be used with logprobs: prompts are not scored", param="echo")
    if body.max_tokens is None:
        raise ApiError(400, "max_tokens is null; give a number", param="max_tokens")
    form = form_of(None, body.structured_outputs)
    jobs = []
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "prompt is empty; give a text to continue", param="prompt")
        segment = Segment("text", check_unicode(prompt))
        job = job_of(context, owner, [segment], body, body.max_tokens)
        guide = guide_of(context, form, body)
        jobs.append(replace(job, n=body.n or 1, logprobs=body.logprobs, guide=guide))
    return jobs


async def _whole(
    context: Context, jobs: Sequence[Job], prompts: Sequence[str], body: CompletionRequest
) -> dict[str, Any]:
    texts: list[_Text] = []
    ends: list[Finished] = []
    for job, prompt in zip(jobs, prompts, strict=True):
        mine = [_Text(prompt if body.echo else "") for _ in range(job.n)]
        texts += mine
        async with aclosing(each(context, job)) as events:
            async for one in events:
                if isinstance(one, Delta):
                    mine[one.index].text += one.text
                    mine[one.index].probs += one.probs
                elif isinstance(one, Ended):
                    mine[one.index].reason = one.openai_reason
                elif isinstance(one, Finished):
                    ends.append(one)
    choices = [
        {
            "index": index, "text": choice.text, "finish_reason": choice.reason,
            "logprobs": None if body.logprobs is None else _probs(choice.probs, 0),
        }
        for index, choice in enumerate(texts)
    ]  # fmt: skip
    return {**head("cmpl", "text_completion", context), "choices": choices, "usage": _usage(ends)}


async def _chunks(
    context: Context, jobs: Sequence[Job], prompts: Sequence[str], body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    begin = head("cmpl", "text_completion", context)
    ends: list[Finished] = []

    def chunk(index: int, text: str, probs: Mapping[str, Any] | None = None, end: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": probs, "finish_reason": end}
        return event({**begin, "choices": [choice]})

    def told(one: Event, first: int, offsets: list[int]) -> Iterator[bytes]:
        if isinstance(one, Delta) and (one.text or one.probs):
            probs = _probs(one.probs, offsets[one.index]) if one.probs else None
            offsets[one.index] += len(one.text)
            yield chunk(first + one.index, one.text, probs)
        elif isinstance(one, Ended):
            yield chunk(first + one.index, "", end=one.openai_reason)
        elif isinstance(one, Finished):
            ends.append(one)

    first = 0
    for job, prompt in zip(jobs, prompts, strict=True):
        if body.echo:
            for index in range(job.n):
                yield chunk(first + index, prompt)
        async with aclosing(written(context, job, partial(told, first=first, offsets=[0] * job.n))) as pieces:
            async for piece in pieces:
                yield piece
        first += job.n
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event({**begin, "choices": [], "usage": _usage(ends)})


def _probs(probs: Sequence[TokenProb], offset: int) -> dict[str, Any]:
    """Probabilities as the old form has them: lists side by side."""
    offsets = []
    for prob in probs:
        offsets.append(offset)
        offset += len(prob.text)
    return {
        "tokens": [prob.text for prob in probs],
        "token_logprobs": [prob.logprob for prob in probs],
        "top_logprobs": [{other.text: other.logprob for other in prob.top} for prob in probs],
        "text_offset": offsets,
    }


def _usage(ends: Sequence[Finished]) -> dict[str, Any]:
    prompt, reply = sum(one.prompt_tokens for one in ends), sum(one.completion_tokens for one in ends)
    cached = sum(one.cached_tokens for one in ends)
    return {
        "prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip
