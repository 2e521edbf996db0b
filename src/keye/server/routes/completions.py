"""POST /v1/completions: text goes on, without a chat template. The old form, which many tools still use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.template import Segment
from keye.chat.tokenizer import check_unicode
from keye.engine.prompt import Prompt, Room
from keye.engine.request import Delta, Ended, Event, Finished, Prefilled, TokenProb
from keye.engine.request import Request as Job
from keye.engine.scheduler import MAX_PROBS
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.notes import current_notes
from keye.server.openai.events import RunningUsage, each, head, notes_of, prompt_probs_of, stop_of, written
from keye.server.openai.forms import form_of
from keye.server.openai.prepare import check_stream_options, guide_of, job_of
from keye.server.openai.schemas import CompletionRequest
from keye.server.openai.sse import event, streamed, until_gone
from keye.server.routes.json_route import JsonRoute

router = APIRouter(route_class=JsonRoute)

_CUT: Final = "truncate_prompt_tokens"


@dataclass(frozen=True)
class _Run:
    """One prompt and its job. `echo` is its text where replies are to repeat it. Where `scores`, the prompt is all that
    is wanted, and the one token that the engine draws is left out."""

    job: Job
    echo: str
    scores: bool


@dataclass
class _Text:
    """One choice while it grows."""

    text: str = ""
    probs: list[TokenProb] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens."""
        return sum(prob.logprob for prob in self.probs) / max(1, len(self.probs))


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues each text; special tokens written in it are plain text. Prompts of token ids stand as they are."""
    context = context_of(request)
    runs = await until_gone(request, context.in_thread(_runs, context, owner_of(request), body))
    if body.stream:
        return await streamed(request, _chunks(context, runs, body))
    return JSONResponse(await until_gone(request, _whole(context, runs, body)))


def _runs(context: Context, owner: str, body: CompletionRequest) -> list[_Run]:
    context.check_model(body.model)
    check_stream_options(body.stream, body.stream_options)
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n or (best_of > n and body.stream):
        raise ApiError(400, "best_of must be at least n, and equal to it in a stream", param="best_of")
    scores = body.max_tokens == 0
    if scores and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo: true; give at least 1", param="max_tokens")
    form = form_of(body)
    guide = guide_of(context, form, body)
    probed = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    runs = []
    for prompt in _prompts(body):
        laid, text = _laid_out(context, prompt, body)
        job = job_of(context, owner, laid, body, body.max_tokens or (1 if scores else None), held=guide is not None)
        logprobs = 0 if best_of > n and body.logprobs is None else body.logprobs
        job = replace(job, n=best_of, logprobs=logprobs, prompt_logprobs=probed, guide=guide)
        runs.append(_Run(job, text if body.echo else "", scores))
    return runs


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]  # one text, or the token ids of one
    return prompt


def _laid_out(
    context: Context, prompt: str | list[int], body: CompletionRequest
) -> tuple[Sequence[Segment] | Prompt, str]:
    """A prompt for the engine, and its text."""
    model, cut = context.model, body.truncate_prompt_tokens
    if isinstance(prompt, str):
        if not prompt:
            raise ApiError(400, "prompt is empty; give a text to continue", param="prompt")
        if cut is None:
            return [Segment("text", check_unicode(prompt))], prompt
        prompt = model.tokenizer.encode(check_unicode(prompt))
    limit = model.config.text.max_position_embeddings
    if cut == 0:
        raise ApiError(400, "truncate_prompt_tokens is 0; give at least 1, or -1 for what fits", param=_CUT)
    if cut is not None:
        prompt = prompt[-(max(1, limit - (body.max_tokens or 1)) if cut == -1 else cut) :]
    Room(limit, 1 if not context.settings.strict_limits else max(1, body.max_tokens or 1)).check(len(prompt), 0)
    return model.runtime.prompts.of_tokens(prompt), model.tokenizer.decode(prompt, skip_special=False)


async def _whole(context: Context, runs: Sequence[_Run], body: CompletionRequest) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    ends: list[Finished] = []
    for run in runs:
        mine = [_Text() for _ in range(run.job.n)]
        async with aclosing(each(context, run.job)) as events:
            async for one in events:
                if isinstance(one, Delta) and not run.scores:
                    mine[one.index].text += one.text
                    mine[one.index].probs += one.probs
                    mine[one.index].tokens += one.tokens
                elif isinstance(one, Ended):
                    mine[one.index].ended = one
                elif isinstance(one, Finished):
                    ends.append(one)
        if sum(len(end.prompt_probs or ()) * ((run.job.prompt_logprobs or 0) + 1) for end in ends) > MAX_PROBS:
            raise ApiError(400, "the prompts have too many tokens to be scored together; send fewer", param="prompt")
        best = sorted(mine, key=lambda text: -text.likelihood)[: body.n or 1] if len(mine) > (body.n or 1) else mine
        for text in best:
            choices.append(_choice(context, len(choices), text, run, ends[-1], body))
    usage = _usage(ends, scores=runs[0].scores)
    notes = list(dict.fromkeys([*current_notes(), *(note for end in ends for note in notes_of(end))]))
    findings = {"keye": {"notes": notes}} if notes else {}
    return {**head("cmpl", "text_completion", context), "choices": choices, "usage": usage, **findings}


def _choice(
    context: Context, index: int, text: _Text, run: _Run, finished: Finished, body: CompletionRequest
) -> dict[str, Any]:
    assert text.ended is not None
    ended = Ended(0, "length") if run.scores else text.ended
    choice: dict[str, Any] = {
        "index": index, "text": run.echo + text.text, "logprobs": None, "finish_reason": ended.openai_reason,
        **stop_of(ended),
    }  # fmt: skip
    if body.logprobs is not None:
        first = int(finished.prompt.token_ids[0])
        scored = _scored(context, first, finished.prompt_probs or ()) if body.echo else _lists((), 0)
        choice["logprobs"] = {name: [*scored[name], *more] for name, more in _lists(text.probs, len(run.echo)).items()}
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_probs_of(finished.prompt_probs)
    if body.return_token_ids:
        choice |= {"token_ids": text.tokens, "prompt_token_ids": finished.prompt.token_ids.tolist()}
    return choice


async def _chunks(context: Context, runs: Sequence[_Run], body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    begin, options = head("cmpl", "text_completion", context), body.stream_options
    count = RunningUsage(bool(options and options.continuous_usage_stats))
    wants_usage = bool(options and (options.include_usage or options.continuous_usage_stats))
    ends: list[Finished] = []

    def chunk(index: int, text: str, probs: Mapping[str, Any] | None = None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": probs, "finish_reason": None, **more}
        notes = [*current_notes(), *count.notes] if choice["finish_reason"] and not wants_usage else []
        findings = {"keye": {"notes": notes}} if notes else {}
        return event({**begin, "choices": [choice], **count.fields(), **findings})

    def told(one: Event, run: _Run, first: int, offsets: list[int]) -> Iterator[bytes]:
        count.see(one)
        if isinstance(one, Prefilled) and body.echo:
            scored = None if body.logprobs is None else _scored(context, one.first_token, one.prompt_probs or ())
            for index in range(run.job.n):
                yield chunk(first + index, run.echo, scored)
        elif isinstance(one, Delta) and (one.text or one.probs) and not run.scores:
            probs = None if body.logprobs is None else _lists(one.probs, offsets[one.index])
            offsets[one.index] += len(one.text)
            more = {"token_ids": list(one.tokens)} if body.return_token_ids else {}
            yield chunk(first + one.index, one.text, probs, **more)
        elif isinstance(one, Ended):
            ended = Ended(one.index, "length") if run.scores else one
            yield chunk(first + one.index, "", finish_reason=ended.openai_reason, **stop_of(ended))
        elif isinstance(one, Finished):
            ends.append(one)

    first = 0
    for run in runs:
        offsets = [len(run.echo)] * run.job.n
        events = written(context, run.job, partial(told, run=run, first=first, offsets=offsets))
        async with aclosing(events) as pieces:
            async for piece in pieces:
                yield piece
        first += run.job.n
    if wants_usage:
        notes = [*current_notes(), *count.notes]
        findings = {"keye": {"notes": notes}} if notes else {}
        yield event({**begin, "choices": [], "usage": _usage(ends, scores=runs[0].scores), **findings})


def _scored(context: Context, first: int, probs: Sequence[TokenProb]) -> dict[str, list[Any]]:
    """The tokens of a prompt with their probabilities; the first, which follows nothing, has none."""
    text = context.model.tokenizer.token_bytes(first).decode("utf-8", "replace")
    found = _lists(probs, len(text))
    return {
        "tokens": [text, *found["tokens"]],
        "token_logprobs": [None, *found["token_logprobs"]],
        "top_logprobs": [None, *found["top_logprobs"]],
        "text_offset": [0, *found["text_offset"]],
    }


def _lists(probs: Sequence[TokenProb], offset: int) -> dict[str, list[Any]]:
    """Probabilities as the old form has them: lists side by side. The token itself is always among the likeliest."""
    offsets = []
    for prob in probs:
        offsets.append(offset)
        offset += len(prob.text)
    return {
        "tokens": [_name(prob) for prob in probs],
        "token_logprobs": [prob.logprob for prob in probs],
        "top_logprobs": [{_name(other): other.logprob for other in (*prob.top, prob)} for prob in probs],
        "text_offset": offsets,
    }


def _name(prob: TokenProb) -> str:
    """The text of a token; its bytes where they are no text by themselves, so that two tokens never have one name."""
    if "\ufffd" not in prob.text:
        return prob.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in prob.raw)


def _usage(ends: Sequence[Finished], *, scores: bool) -> dict[str, Any]:
    """Usage of all prompts; where they were only scored, what the engine drew is none."""
    prompt, reply = sum(one.prompt_tokens for one in ends), sum(one.completion_tokens for one in ends)
    reply = 0 if scores else reply
    return {
        "prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in ends)},
    }  # fmt: skip
