"""SGLang's POST /generate: a prompt as it stands, in text or token ids, without a chat template. The client wrote the
whole prompt, so special tokens in its text count."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from keye.chat.messages import Medium
from keye.chat.template import Segment
from keye.chat.tokenizer import check_unicode
from keye.engine.media import check_medium
from keye.engine.prompt import Prompt, Room
from keye.engine.request import Delta, Ended, Event, Finished, TokenProb
from keye.engine.request import Request as Job
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.edge.ids import new_id
from keye.server.errors import error_of_validation
from keye.server.notes import current_notes
from keye.server.openai.events import each, notes_of, written
from keye.server.openai.fields import note_ignored
from keye.server.openai.forms import form_of
from keye.server.openai.media_parts import media_of, open_sources, to_messages
from keye.server.openai.prepare import guide_of, job_of
from keye.server.openai.schemas import Forms, Sampling
from keye.server.openai.schemas_peers import GenerateRequest
from keye.server.openai.sse import event, streamed, until_gone
from keye.server.routes.json_route import JsonRoute

router = APIRouter(route_class=JsonRoute)

#: Where media stand in a text: their pads, with the marks that a template writes around them.
_PLACE: Final = re.compile(r"(?:<\|vision_start\|>)?<\|(image|video)_pad\|>(?:<\|vision_end\|>)?")
_DEFAULT_TOKENS: Final = 128
#: Settings of SGLang's that do not change the text here.
_WITHOUT_MEANING: Final = frozenset({"spaces_between_special_tokens", "custom_params", "stream_interval"})
_FORMS: Final = ("json_schema", "regex", "ebnf", "structural_tag")


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Continues each prompt, as SGLang's own interface does; with `stream` each event has the whole text so far."""
    context = context_of(request)
    context.check_model(body.model)
    runs = await until_gone(request, context.in_thread(_runs, context, owner_of(request), body))
    if body.stream:
        return await streamed(request, _events(context, runs))
    replies = await until_gone(request, _whole(context, runs))
    many = len(runs) > 1 or runs[0].job.n > 1 or runs[0].listed
    return JSONResponse(replies if many else replies[0])


@dataclass
class _Reply:
    """One continuation while it grows."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    reason: str | None = None
    met: str | int | None = None


@dataclass(frozen=True)
class _Run:
    """One prompt: its job, the id of its replies, whether it came in a list, and from which of its tokens on their
    probabilities are wanted; none where that is negative. `notes` are those of the request."""

    job: Job
    name: str
    listed: bool
    start: int
    begin: float
    notes: Sequence[str]


def _runs(context: Context, owner: str, body: GenerateRequest) -> list[_Run]:
    """The jobs of a body. Blocks: media are opened, forms read."""
    prompts, listed = _prompts(context, owner, body)
    params = body.sampling_params or {}
    runs = []
    for index, prompt in enumerate(prompts):
        job = _job(context, owner, prompt, _of_prompt(params, index, len(prompts), "sampling_params"))
        start = -1
        if _of_prompt(body.return_logprob, index, len(prompts), "return_logprob"):
            start = _of_prompt(body.logprob_start_len, index, len(prompts), "logprob_start_len") or 0
            start = start if body.logprob_start_len is not None else -1
            others = body.top_logprobs_num or 0
            job = replace(job, logprobs=others, prompt_logprobs=others if start >= 0 else None)
        name = _of_prompt(body.rid, index, len(prompts), "rid") or new_id("")
        runs.append(_Run(job, name, listed, start, time.perf_counter(), current_notes()))
    return runs


def _of_prompt(given: Any, index: int, count: int, name: str) -> Any:
    """The value for one of `count` prompts of a field that is one for all, or a list."""
    if not isinstance(given, list):
        return given
    if len(given) != count:
        raise ApiError(400, f"{name}: give one, or as many as prompts", param=name)
    return given[index]


def _prompts(context: Context, owner: str, body: GenerateRequest) -> tuple[list[list[Segment] | Prompt], bool]:
    """The prompts, and whether they came in a list."""
    if body.input_ids is not None:
        if body.image_data or body.video_data:
            raise ApiError(
                400, "input_ids cannot hold media; give text with image_data or video_data", param="input_ids"
            )
        listed = isinstance(body.input_ids[0], list)
        many = body.input_ids if listed else [body.input_ids]
        return [context.model.runtime.prompts.of_tokens(ids) for ids in many], listed  # type: ignore[arg-type]
    assert body.text is not None
    texts = body.text if isinstance(body.text, list) else [body.text]
    images = _of_each(body.image_data, len(texts), "image_data")
    videos = _of_each(body.video_data, len(texts), "video_data")
    return [
        _segments(context, owner, text, image, video, body.preprocess_kwargs)
        for text, image, video in zip(texts, images, videos, strict=True)
    ], isinstance(body.text, list)


def _of_each(given: Any, count: int, name: str) -> list[list[Any]]:
    """The media of each of `count` prompts: one medium, a list for the one prompt, or a list for each."""
    if given is None:
        return [[] for _ in range(count)]
    if count == 1:
        flat = given if isinstance(given, list) else [given]
        return [flat[0] if len(flat) == 1 and isinstance(flat[0], list) else flat]
    if not isinstance(given, list) or len(given) != count:
        raise ApiError(400, f"{name}: give a list with the media of each of the {count} prompts", param=name)
    return [one if isinstance(one, list) else [] if one is None else [one] for one in given]


def _segments(
    context: Context, owner: str, text: str, images: Sequence[Any], videos: Sequence[Any], defaults: Any
) -> list[Segment]:
    """A text with its media where their marks stand, or before it where it has none."""
    if not text and not images and not videos:
        raise ApiError(400, "text is empty; give a text to continue", param="text")
    content = [_part("image", one) for one in images] + [_part("video", one) for one in videos]
    if len(content) > context.settings.media:
        raise ApiError(400, f"{len(content)} media are more than {context.settings.media}", param="image_data")
    media: dict[str, list[Medium]] = {"image": [], "video": []}
    if content:
        opener = context.opener(owner)
        messages = to_messages([{"role": "user", "content": content}], opener, defaults)
        for medium in media_of(open_sources(messages, opener)):
            check_medium(medium)
            media[medium.kind].append(medium)
    pieces = _PLACE.split(check_unicode(text))
    if len(pieces) == 1:
        return [*(one for kind in media.values() for medium in kind for one in _marked(medium)),
                Segment("template", text)]  # fmt: skip
    segments = [Segment("template", pieces[0])]
    for kind, after in zip(pieces[1::2], pieces[2::2], strict=True):
        if not media[kind]:
            raise ApiError(400, f"text has more {kind} marks than {kind}_data has media", param="text")
        segments += [*_marked(media[kind].pop(0)), Segment("template", after)]
    if left := [kind for kind, rest in media.items() if rest]:
        raise ApiError(400, f"text has fewer {left[0]} marks than {left[0]}_data has media", param="text")
    return [segment for segment in segments if segment.value]


def _marked(medium: Medium) -> tuple[Segment, ...]:
    return (
        Segment("template", "<|vision_start|>"), Segment(medium.kind, medium), Segment("template", "<|vision_end|>"),
    )  # fmt: skip


def _part(kind: str, value: object) -> dict[str, Any]:
    """A medium as a part of a message: a URL, a data: URL, an upload, or base64 alone."""
    if isinstance(value, Mapping) and set(value) <= {"url", "detail"}:
        value = value.get("url")
    if isinstance(value, str) and not value.startswith(("http://", "https://", "data:", "file-", "index-")):
        return {"type": f"input_{kind}", "data": value}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": value}}


def _job(context: Context, owner: str, prompt: Sequence[Segment] | Prompt, params: Mapping[str, Any]) -> Job:
    """A job with settings in SGLang's words."""
    given = {key: value for key, value in params.items() if value is not None}
    if idle := given.keys() & _WITHOUT_MEANING:
        note_ignored([f"sampling_params.{name}" for name in idle])
        given = {key: value for key, value in given.items() if key not in idle}
    tokens, n = given.pop("max_new_tokens", _DEFAULT_TOKENS), given.pop("n", 1)
    if type(tokens) is not int or not 1 <= tokens <= 10_000_000:
        raise ApiError(400, "max_new_tokens must be a number from 1 to 10,000,000", param="sampling_params")
    if type(n) is not int or not 1 <= n <= 16:
        raise ApiError(400, "n must be a number from 1 to 16", param="sampling_params")
    for theirs, ours in (("min_new_tokens", "min_tokens"), ("sampling_seed", "seed")):
        if theirs in given:
            given[ours] = given.pop(theirs)
    if given.get("top_k", 0) == 1 << 30:  # SGLang's way to say all
        del given["top_k"]
    forms = {name: given.pop(name) for name in _FORMS if name in given}
    try:
        sampling = Sampling.model_validate(given)
        structured = Forms.model_validate(forms)
    except ValidationError as error:
        raise error_of_validation(
            [{**one, "loc": ("sampling_params", *one["loc"])} for one in error.errors()]
        ) from None
    guide = guide_of(context, form_of(structured), sampling)
    if isinstance(prompt, Prompt) and context.settings.strict_limits:
        Room(context.model.config.text.max_position_embeddings, tokens).check(len(prompt.token_ids), 0)
    job = job_of(context, owner, prompt, sampling, tokens, held=guide is not None)
    return replace(job, n=n, guide=guide)


async def _whole(context: Context, runs: Sequence[_Run]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for run in runs:
        mine = [_Reply() for _ in range(run.job.n)]
        async with aclosing(each(context, run.job)) as events:
            async for one in events:
                _grow(mine, one)
                if isinstance(one, Finished):
                    told += [_told(run, reply, len(reply.tokens), one) for reply in mine]
    return told


async def _events(context: Context, runs: Sequence[_Run]) -> AsyncGenerator[bytes, None]:
    first = 0
    for run in runs:
        mine = [_Reply() for _ in range(run.job.n)]

        def write(one: Event, run: _Run, mine: list[_Reply], first: int) -> Iterator[bytes]:
            _grow(mine, one)
            if isinstance(one, Delta) and one.tokens:
                yield event({**_told(run, mine[one.index], len(mine[one.index].tokens)), "index": first + one.index})
            elif isinstance(one, Finished):
                for index, reply in enumerate(mine):
                    yield event({**_told(run, reply, len(reply.tokens), one), "index": first + index})

        async with aclosing(written(context, run.job, partial(write, run=run, mine=mine, first=first))) as pieces:
            async for piece in pieces:
                yield piece
        first += run.job.n


def _grow(replies: Sequence[_Reply], one: Event) -> None:
    if isinstance(one, Delta):
        reply = replies[one.index]
        reply.text += one.text
        reply.tokens += one.tokens
        reply.probs += one.probs
    elif isinstance(one, Ended):
        replies[one.index].reason, replies[one.index].met = one.reason, one.met


def _told(run: _Run, reply: _Reply, tokens: int, finished: Finished | None = None) -> dict[str, Any]:
    """A reply as SGLang tells of it; `finished` at its end."""
    meta: dict[str, Any] = {
        "id": run.name,
        "finish_reason": None if finished is None else _reason(reply, tokens),
        "prompt_tokens": 0 if finished is None else finished.prompt_tokens,
        "completion_tokens": tokens,
        "cached_tokens": 0 if finished is None else finished.cached_tokens,
        "weight_version": "default",
        "e2e_latency": round(time.perf_counter() - run.begin, 6),
    }
    if run.job.logprobs is not None and finished is not None:
        meta["output_token_logprobs"] = [[one.logprob, one.token, one.text] for one in reply.probs]
        meta["input_token_logprobs"] = _prompt_probs(run, finished)
        if run.job.logprobs:
            meta["output_top_logprobs"] = [
                [[other.logprob, other.token, other.text] for other in one.top] for one in reply.probs
            ]
    told: dict[str, Any] = {"text": reply.text, "meta_info": meta}
    if finished is None:
        return told
    notes = list(dict.fromkeys((*run.notes, *notes_of(finished))))
    return {**told, "output_ids": reply.tokens, **({"keye": {"notes": notes}} if notes else {})}


def _prompt_probs(run: _Run, finished: Finished) -> list[list[Any]]:
    """The tokens of the prompt from `start` on with their log-probabilities; the first follows nothing and has none."""
    if run.start < 0 or finished.prompt_probs is None:
        return []
    first: list[list[Any]] = [[None, int(finished.prompt.token_ids[0]), None]]
    probs = [[one.logprob, one.token, one.text] for one in finished.prompt_probs]
    return [*first, *probs][run.start :]


def _reason(reply: _Reply, tokens: int) -> dict[str, Any]:
    """Why a reply has ended, with what was met."""
    if reply.reason == "length":
        return {"type": "length", "length": tokens}
    return {"type": "stop", "matched": reply.met}
