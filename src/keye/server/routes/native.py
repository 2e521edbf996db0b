"""SGLang's POST /generate: a prompt as it stands, in text or token ids, without a chat template. The client wrote the
whole prompt, so special tokens in its text count."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from keye.chat.messages import Medium
from keye.chat.template import Segment
from keye.chat.tokenizer import check_unicode
from keye.engine.media import check_medium
from keye.engine.prompt import ContextBudget, Prompt
from keye.engine.request import Delta, Ended, Event, Finished, GenerationRequest
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.audit import new_id
from keye.server.edge.errors import ApiError
from keye.server.errors import current_notes, error_of_validation
from keye.server.openai.events import Continuation, Encode, collect, encode_events, notes_of
from keye.server.openai.fields import note_ignored
from keye.server.openai.http import JsonRoute, cancel_on_disconnect, event, stream_events
from keye.server.openai.media_parts import media_of, open_sources, to_messages
from keye.server.openai.prepare import form_of, make_guide, make_request
from keye.server.openai.schemas import Forms, GenerateRequest, Sampling

router = APIRouter(route_class=JsonRoute)

#: Where media stand in a text: their pads, with the marks that a template writes around them.
_PLACE: Final = re.compile(r"(?:<\|vision_start\|>)?<\|(image|video)_pad\|>(?:<\|vision_end\|>)?")
_DEFAULT_TOKENS: Final = 128
#: Settings of SGLang's that do not change the text here.
_WITHOUT_MEANING: Final = frozenset({"spaces_between_special_tokens", "custom_params", "stream_interval"})
_FORMS: Final = ("json_schema", "regex", "ebnf", "structural_tag")


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Continues each prompt, as SGLang's own interface does; with `stream` each event has the text so far."""
    context = context_of(request)
    context.check_model(body.model)
    runs = await cancel_on_disconnect(request, context.in_thread(_make_runs, context, owner_of(request), body))
    if body.stream:
        firsts = accumulate((run.request.n for run in runs), initial=0)
        encoders = [(run.request, _encoder(run, first)) for run, first in zip(runs, firsts, strict=False)]
        return await stream_events(request, encode_events(context, *encoders))
    objects = await cancel_on_disconnect(request, _answer(context, runs))
    many = len(runs) > 1 or runs[0].request.n > 1 or runs[0].is_listed
    return JSONResponse(objects if many else objects[0])


@dataclass(frozen=True)
class _Run:
    """One prompt: its request, the id of its replies, whether it came in a list, and from which of its tokens on their
    probabilities are wanted; none where `start` is negative. `notes` are those of the HTTP request."""

    request: GenerationRequest
    name: str
    is_listed: bool
    start: int
    begin: float
    notes: Sequence[str]


def _make_runs(context: Context, owner: str, body: GenerateRequest) -> list[_Run]:
    """The engine's requests of a body. Blocks: media are opened, forms compiled."""
    prompts, is_listed = _prompts(context, owner, body)
    params = body.sampling_params or {}
    runs = []
    for index, prompt in enumerate(prompts):
        request = _make_request(context, owner, prompt, _of_prompt(params, index, len(prompts), "sampling_params"))
        request = replace(request, adapter=context.adapter_of(body.model))
        start = -1
        if _of_prompt(body.return_logprob, index, len(prompts), "return_logprob"):
            start = _of_prompt(body.logprob_start_len, index, len(prompts), "logprob_start_len") or 0
            start = start if body.logprob_start_len is not None else -1
            others = body.top_logprobs_num or 0
            request = replace(request, logprobs=others, prompt_logprobs=others if start >= 0 else None)
        name = _of_prompt(body.rid, index, len(prompts), "rid") or new_id("")
        runs.append(_Run(request, name, is_listed, start, time.perf_counter(), current_notes()))
    return runs


def _of_prompt(value: Any, index: int, count: int, name: str) -> Any:
    """The value for one of `count` prompts of a field that is one for all, or a list."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise ApiError(400, f"{name}: give one, or as many as prompts", param=name)
    return value[index]


def _prompts(context: Context, owner: str, body: GenerateRequest) -> tuple[list[list[Segment] | Prompt], bool]:
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
    images = _media_of_prompts(body.image_data, len(texts), "image_data")
    videos = _media_of_prompts(body.video_data, len(texts), "video_data")
    return [
        _segments(context, owner, text, image, video, body.preprocess_kwargs)
        for text, image, video in zip(texts, images, videos, strict=True)
    ], isinstance(body.text, list)


def _media_of_prompts(media: Any, count: int, name: str) -> list[list[Any]]:
    """The media of each of `count` prompts: one medium, a list for the one prompt, or a list for each."""
    if media is None:
        return [[] for _ in range(count)]
    if count == 1:
        flat = media if isinstance(media, list) else [media]
        return [flat[0] if len(flat) == 1 and isinstance(flat[0], list) else flat]
    if not isinstance(media, list) or len(media) != count:
        raise ApiError(400, f"{name}: give a list with the media of each of the {count} prompts", param=name)
    return [item if isinstance(item, list) else [] if item is None else [item] for item in media]


def _segments(
    context: Context, owner: str, text: str, images: Sequence[Any], videos: Sequence[Any], defaults: Any
) -> list[Segment]:
    """A text with its media where their marks stand, or before it where it has none."""
    if not text and not images and not videos:
        raise ApiError(400, "text is empty; give a text to continue", param="text")
    content = [_part("image", name) for name in images] + [_part("video", name) for name in videos]
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
        return [*(segment for kind in media.values() for medium in kind for segment in _marked(medium)),
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


def _make_request(
    context: Context, owner: str, prompt: Sequence[Segment] | Prompt, params: Mapping[str, Any]
) -> GenerationRequest:
    settings = {key: value for key, value in params.items() if value is not None}
    if ignored := settings.keys() & _WITHOUT_MEANING:
        note_ignored([f"sampling_params.{name}" for name in ignored])
        settings = {key: value for key, value in settings.items() if key not in ignored}
    tokens, n = settings.pop("max_new_tokens", _DEFAULT_TOKENS), settings.pop("n", 1)
    if type(tokens) is not int or not 1 <= tokens <= 10_000_000:
        raise ApiError(400, "max_new_tokens must be a number from 1 to 10,000,000", param="sampling_params")
    if type(n) is not int or not 1 <= n <= 16:
        raise ApiError(400, "n must be a number from 1 to 16", param="sampling_params")
    for theirs, ours in (("min_new_tokens", "min_tokens"), ("sampling_seed", "seed")):
        if theirs in settings:
            settings[ours] = settings.pop(theirs)
    if settings.get("top_k", 0) == 1 << 30:  # SGLang's way to say all
        del settings["top_k"]
    forms = {name: settings.pop(name) for name in _FORMS if name in settings}
    try:
        sampling = Sampling.model_validate(settings)
        structured = Forms.model_validate(forms)
    except ValidationError as error:
        details = [{**detail, "loc": ("sampling_params", *detail["loc"])} for detail in error.errors()]
        raise error_of_validation(details) from None
    form = form_of(structured)
    guide = make_guide(context, form, sampling) if form else None
    if isinstance(prompt, Prompt) and context.settings.strict_limits:
        ContextBudget(context.model.config.text.max_position_embeddings, tokens).check(len(prompt.token_ids), 0)
    request = make_request(context, owner, prompt, sampling, tokens, has_form=guide is not None)
    return replace(request, n=n, guide=guide)


async def _answer(context: Context, runs: Sequence[_Run]) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = []
    for run in runs:
        replies = [Continuation() for _ in range(run.request.n)]
        finished = await collect(context, run.request, replies)
        objects += [_reply_object(run, reply, finished) for reply in replies]
    return objects


def _encoder(run: _Run, first: int) -> Encode:
    """Encodes the events of one prompt, whose first choice is number `first`."""
    replies = [Continuation() for _ in range(run.request.n)]

    def encode(item: Event) -> Iterator[bytes]:
        if isinstance(item, Delta | Ended):
            replies[item.choice_index].take(item)
            if isinstance(item, Delta) and item.tokens:
                data = _reply_object(run, replies[item.choice_index])
                yield event({**data, "index": first + item.choice_index})
        elif isinstance(item, Finished):
            for index, reply in enumerate(replies):
                yield event({**_reply_object(run, reply, item), "index": first + index})

    return encode


def _reply_object(run: _Run, reply: Continuation, finished: Finished | None = None) -> dict[str, Any]:
    """A reply in SGLang's form; `finished` at its end."""
    reason: dict[str, Any] | None = None
    if finished is not None and reply.ended is not None:
        is_cut = reply.ended.reason == "length"
        stop = {"type": "stop", "matched": reply.ended.met}
        reason = {"type": "length", "length": len(reply.tokens)} if is_cut else stop
    meta: dict[str, Any] = {
        "id": run.name, "finish_reason": reason, "prompt_tokens": 0 if finished is None else finished.prompt_tokens,
        "completion_tokens": len(reply.tokens), "cached_tokens": 0 if finished is None else finished.cached_tokens,
        "weight_version": "default", "e2e_latency": round(time.perf_counter() - run.begin, 6),
    }  # fmt: skip
    if run.request.logprobs is not None and finished is not None:
        meta["output_token_logprobs"] = [[prob.logprob, prob.token, prob.text] for prob in reply.probs]
        meta["input_token_logprobs"] = _prompt_probs(run, finished)
        if run.request.logprobs:
            meta["output_top_logprobs"] = [
                [[other.logprob, other.token, other.text] for other in prob.top] for prob in reply.probs
            ]
    data: dict[str, Any] = {"text": reply.text, "meta_info": meta}
    if finished is None:
        return data
    notes = list(dict.fromkeys((*run.notes, *notes_of(finished))))
    return {**data, "output_ids": reply.tokens, **({"keye": {"notes": notes}} if notes else {})}


def _prompt_probs(run: _Run, finished: Finished) -> list[list[Any]]:
    """The tokens of the prompt from `start` on with their log-probabilities; the first follows nothing and has none."""
    if run.start < 0 or finished.prompt_probs is None:
        return []
    first: list[list[Any]] = [[None, int(finished.prompt.token_ids[0]), None]]
    probs = [[prob.logprob, prob.token, prob.text] for prob in finished.prompt_probs]
    return [*first, *probs][run.start :]
