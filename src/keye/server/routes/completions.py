"""POST /v1/completions: text is continued without a chat template. The old form, which many tools still use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.template import Segment
from keye.chat.tokenizer import check_unicode
from keye.engine.prompt import ContextBudget, Prompt
from keye.engine.request import Delta, Ended, Event, Finished, GenerationRequest, Prefilled, TokenProb
from keye.engine.scheduler import MAX_PROBS
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import current_notes
from keye.server.openai.events import (
    Continuation,
    Encode,
    RunningUsage,
    collect,
    encode_events,
    notes_of,
    prompt_prob_objects,
    reply_head,
    stop_fields,
)
from keye.server.openai.http import JsonRoute, cancel_on_disconnect, event, stream_events
from keye.server.openai.prepare import check_stream_options, form_of, make_guide, make_request
from keye.server.openai.schemas import CompletionRequest

router = APIRouter(route_class=JsonRoute)

_CUT: Final = "truncate_prompt_tokens"


@dataclass(frozen=True)
class _Run:
    """One prompt with its request, whose first choice is choice `first` of the answer. `echo` is its text where replies
    repeat it. `scores`: only the prompt is wanted, and the one token that the engine draws is left out."""

    request: GenerationRequest
    echo: str
    scores: bool
    first: int


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues each text; special tokens written in it are plain text. Prompts of token ids are used as they are."""
    context = context_of(request)
    runs = await cancel_on_disconnect(request, context.in_thread(_make_runs, context, owner_of(request), body))
    if body.stream:
        return await stream_events(request, _stream(context, runs, body))
    return JSONResponse(await cancel_on_disconnect(request, _answer(context, runs, body)))


def _make_runs(context: Context, owner: str, body: CompletionRequest) -> list[_Run]:
    context.check_model(body.model)
    check_stream_options(body.stream, body.stream_options)
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n or (best_of > n and body.stream):
        raise ApiError(400, "best_of must be at least n, and equal to it in a stream", param="best_of")
    scores = body.max_tokens == 0
    if scores and not body.echo:
        raise ApiError(400, "max_tokens is 0, which needs echo: true; give at least 1", param="max_tokens")
    form = form_of(body)
    guide = make_guide(context, form, body) if form else None
    is_single = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts: Any = [body.prompt] if is_single else body.prompt
    runs = []
    for number, prompt in enumerate(prompts):
        segments, text = _lay_out(context, prompt, body)
        max_tokens = body.max_tokens or (1 if scores else None)
        request = replace(
            make_request(context, owner, segments, body, max_tokens, has_form=guide is not None),
            n=best_of, logprobs=0 if best_of > n and body.logprobs is None else body.logprobs, guide=guide,
            prompt_logprobs=body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs,
        )  # fmt: skip
        runs.append(_Run(request, text if body.echo else "", scores, number * n))
    return runs


def _lay_out(
    context: Context, prompt: str | list[int], body: CompletionRequest
) -> tuple[Sequence[Segment] | Prompt, str]:
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
    reply = 1 if not context.settings.strict_limits else max(1, body.max_tokens or 1)
    ContextBudget(limit, reply).check(len(prompt), 0)
    return model.runtime.prompts.of_tokens(prompt), model.tokenizer.decode(prompt, skip_special=False)


async def _answer(context: Context, runs: Sequence[_Run], body: CompletionRequest) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    ends: list[Finished] = []
    n = body.n or 1
    for run in runs:
        replies = [Continuation() for _ in range(run.request.n)]
        ends.append(await collect(context, run.request, replies))
        probs = (len(end.prompt_probs or ()) * ((run.request.prompt_logprobs or 0) + 1) for end in ends)
        if sum(probs) > MAX_PROBS:
            raise ApiError(400, "the prompts have too many tokens to be scored together; send fewer", param="prompt")
        if len(replies) > n:
            replies = sorted(replies, key=lambda reply: -fmean([prob.logprob for prob in reply.probs] or [0.0]))[:n]
        choices += [_choice(context, len(choices) + i, reply, run, ends[-1], body) for i, reply in enumerate(replies)]
    notes = dict.fromkeys([*current_notes(), *(note for end in ends for note in notes_of(end))])
    usage = _usage(ends, scores=runs[0].scores)
    return {
        **reply_head("cmpl", "text_completion", context, runs[0].request.adapter), "choices": choices,
        "usage": usage, **_note_fields([*notes]),
    }  # fmt: skip


def _note_fields(notes: Sequence[str]) -> dict[str, Any]:
    return {"keye": {"notes": notes}} if notes else {}


def _choice(
    context: Context, index: int, reply: Continuation, run: _Run, finished: Finished, body: CompletionRequest
) -> dict[str, Any]:
    if run.scores:
        reply = Continuation(ended=Ended(0, "length"))
    assert reply.ended is not None
    choice: dict[str, Any] = {
        "index": index, "text": run.echo + reply.text, "logprobs": None, "finish_reason": reply.ended.openai_reason,
        **stop_fields(reply.ended),
    }  # fmt: skip
    if body.logprobs is not None:
        first = int(finished.prompt.token_ids[0])
        prompt = _prompt_lists(context, first, finished.prompt_probs or ()) if body.echo else _prob_lists((), 0)
        lists = _prob_lists(reply.probs, len(run.echo))
        choice["logprobs"] = {name: [*prompt[name], *values] for name, values in lists.items()}
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_prob_objects(finished.prompt_probs)
    if body.return_token_ids:
        choice |= {"token_ids": reply.tokens, "prompt_token_ids": finished.prompt.token_ids.tolist()}
    return choice


async def _stream(context: Context, runs: Sequence[_Run], body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Chunks of all prompts, one prompt after another, the last with their usage where it was requested."""
    begin, options = reply_head("cmpl", "text_completion", context, runs[0].request.adapter), body.stream_options
    usage = RunningUsage(bool(options and options.continuous_usage_stats))
    has_tail = bool(options and (options.include_usage or options.continuous_usage_stats))
    ends: list[Finished] = []

    def chunk(index: int, text: str, lists: Mapping[str, Any] | None = None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": lists, "finish_reason": None, **more}
        notes = [*current_notes(), *usage.notes] if choice["finish_reason"] and not has_tail else []
        return event({**begin, "choices": [choice], **usage.fields(), **_note_fields(notes)})

    def encoder(run: _Run) -> Encode:
        offsets = [len(run.echo)] * run.request.n

        def encode(item: Event) -> Iterator[bytes]:
            usage.see(item)
            if isinstance(item, Prefilled) and body.echo:
                probs = item.prompt_probs or ()
                lists = None if body.logprobs is None else _prompt_lists(context, item.first_token, probs)
                for index in range(run.request.n):
                    yield chunk(run.first + index, run.echo, lists)
            elif isinstance(item, Delta) and (item.text or item.probs) and not run.scores:
                lists = None if body.logprobs is None else _prob_lists(item.probs, offsets[item.choice_index])
                offsets[item.choice_index] += len(item.text)
                more = {"token_ids": list(item.tokens)} if body.return_token_ids else {}
                yield chunk(run.first + item.choice_index, item.text, lists, **more)
            elif isinstance(item, Ended):
                ended = Ended(item.choice_index, "length") if run.scores else item
                fields = {"finish_reason": ended.openai_reason, **stop_fields(ended)}
                yield chunk(run.first + item.choice_index, "", **fields)
            elif isinstance(item, Finished):
                ends.append(item)

        return encode

    async with aclosing(encode_events(context, *((run.request, encoder(run)) for run in runs))) as events:
        async for piece in events:
            yield piece
    if has_tail:
        tail = {"usage": _usage(ends, scores=runs[0].scores), **_note_fields([*current_notes(), *usage.notes])}
        yield event({**begin, "choices": [], **tail})


def _prompt_lists(context: Context, first: int, probs: Sequence[TokenProb]) -> dict[str, list[Any]]:
    """The tokens of a prompt with their probabilities; the first, which follows nothing, has none."""
    text = context.model.tokenizer.token_bytes(first).decode("utf-8", "replace")
    lists = _prob_lists(probs, len(text))
    first_entries = {"tokens": text, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
    return {name: [entry, *lists[name]] for name, entry in first_entries.items()}


def _prob_lists(probs: Sequence[TokenProb], offset: int) -> dict[str, list[Any]]:
    """Probabilities in the old form: parallel lists. The token itself is always among the likeliest."""
    offsets = []
    for prob in probs:
        offsets.append(offset)
        offset += len(prob.text)
    return {
        "tokens": [_token_name(prob) for prob in probs],
        "token_logprobs": [prob.logprob for prob in probs],
        "top_logprobs": [{_token_name(other): other.logprob for other in (*prob.top, prob)} for prob in probs],
        "text_offset": offsets,
    }


def _token_name(prob: TokenProb) -> str:
    """The text of a token, or its bytes where they are not text by themselves: two tokens never have one name."""
    if "\ufffd" not in prob.text:
        return prob.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in prob.raw)


def _usage(ends: Sequence[Finished], *, scores: bool) -> dict[str, Any]:
    """Usage of all prompts; where they are only scored, the tokens that the engine drew do not count."""
    prompt = sum(end.prompt_tokens for end in ends)
    reply = 0 if scores else sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends)},
    }  # fmt: skip
