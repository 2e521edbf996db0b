"""Health, models, metrics, tokenize and detokenize, and what other servers' clients ask for before they send work."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.template import Segment
from keye.chat.tokenizer import check_unicode
from keye.engine.prompt import MOST_COUNTED
from keye.engine.request import GenerationRequest
from keye.errors import KeyeError
from keye.planning.known_models import list_known_models
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import error_of_mistake, noted
from keye.server.openai.events import Continuation, collect
from keye.server.openai.http import JsonRoute
from keye.server.openai.media_parts import media_of, to_messages
from keye.server.openai.prepare import thinking_of
from keye.server.openai.schemas import DetokenizeRequest, TokenizeRequest
from keye.sessions.search.plans import MOST_WINDOW_FRAMES
from keye.version import __version__

#: Seconds in which a token must come for a model to be called healthy.
_HEALTHY_SECONDS: Final = 20.0
router = APIRouter(route_class=JsonRoute)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Whether the server is alive; needs no key."""
    return JSONResponse({"status": "ok"})


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The model that is served, under each of its names, and its adapters."""
    context = context_of(request)
    names = (*context.names, *context.model.adapters)
    entries = await context.in_thread(lambda: [_model(context, name) for name in names])
    return JSONResponse({"object": "list", "data": entries})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> JSONResponse:
    """One model by its name."""
    context = context_of(request)
    context.check_model(name, strict=True)
    return JSONResponse(await context.in_thread(_model, context, name))


#: What every model that is served can do here.
_CAPABILITIES: Final = ("images", "video", "ask", "ground", "find", "clips", "frames", "scenes", "subtitles", "export")


def _model(context: Context, name: str) -> dict[str, Any]:
    """The entry of a model. Which others fit this machine is for clients on it and for those with a key: the guard lets
    no others in."""
    config, defaults = context.model.config, context.model.runtime.generation_config
    is_adapter = name in context.model.adapters
    scope = defaults.scope
    facts = {
        "context": config.text.max_position_embeddings,
        "release": config.release.name,
        "attention": context.model.runtime.attention,
        "examples": list(defaults.examples),
        "scope": None if scope is None else {k: v for k, v in asdict(scope).items() if k != "words"},
        "measured_frames": MOST_WINDOW_FRAMES if scope is None else scope.frames,
        "capabilities": [able for able in _CAPABILITIES if not (is_adapter and able == "find")],
        "known_models": [known.to_dict() for known in list_known_models()],
    }
    parent = {"parent": context.names[0]} if is_adapter else {}
    return {
        "id": name, "object": "model", "created": int(context.started), "owned_by": "keye", **parent,
        "max_model_len": config.text.max_position_embeddings, "keye": facts,
    }  # fmt: skip


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    context = context_of(request)
    return Response(context.metrics.text(), media_type="text/plain; version=0.0.4")


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> JSONResponse:
    """The tokens of a text, or of the prompt that messages without media become."""
    context = context_of(request)
    context.check_model(body.model)
    tokens = await context.in_thread(_tokens, context, owner_of(request), body)
    limit = context.model.config.text.max_position_embeddings
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": limit, **noted()})


def _tokens(context: Context, owner: str, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        field, parts = "prompt", [(check_unicode(body.prompt), False)]
    else:
        messages = to_messages(body.messages or (), context.opener(owner))
        if media_of(messages):
            raise ApiError(400, "messages hold media; /v1/media/plan counts their tokens", param="messages")
        segments = context.model.render(
            messages, thinking=thinking_of(body.chat_template_kwargs, None), tools=body.tools or (),
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
        )  # fmt: skip
        field, parts = "messages", [(str(segment.value), segment.kind == "template") for segment in segments]
    try:
        tokens = context.model.tokenizer.encode_parts(parts, most=MOST_COUNTED)
    except KeyeError as error:
        raise error_of_mistake(error, param=field) from None
    if len(tokens) > MOST_COUNTED:
        raise ApiError(400, f"{field}: more than {MOST_COUNTED:,} tokens are not counted; send less", param=field)
    return tokens


@router.head("/ping", include_in_schema=False)
@router.get("/ping")
async def ping(request: Request) -> Response:
    """Whether the server is alive; needs no key."""
    return Response()


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def version(request: Request) -> JSONResponse:
    """The version of keye."""
    return JSONResponse({"version": __version__})


@router.get("/load")
async def load(request: Request) -> JSONResponse:
    """Requests that wait or run."""
    gauges = context_of(request).engine.gauges()
    return JSONResponse({"server_load": int(gauges["requests_running"] + gauges["requests_waiting"])})


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """Whether the model still generates: one token is computed."""
    context = context_of(request)
    runtime = context.model.runtime
    params, salt = runtime.sampling_params(max_tokens=1, temperature=0.0), context.salt(owner_of(request))
    probe = GenerationRequest([Segment("text", "1")], params, runtime.attention, ignore_eos=True, salt=salt)
    try:
        async with asyncio.timeout(_HEALTHY_SECONDS):
            await collect(context, probe, [Continuation()])
    except TimeoutError:
        raise ApiError(503, f"no token came within {_HEALTHY_SECONDS:g} s", code="overloaded", retry=5) from None
    return Response()


@router.get("/get_model_info")
@router.get("/model_info")
async def model_info(request: Request) -> JSONResponse:
    """The model, in SGLang's words."""
    return JSONResponse(_model_info(context_of(request)))


@router.get("/get_server_info")
@router.get("/server_info")
async def server_info(request: Request) -> JSONResponse:
    """The server and its model, in SGLang's words."""
    context = context_of(request)
    facts = {
        "version": __version__,
        "served_model_name": context.names[0],
        "context_length": context.model.config.text.max_position_embeddings,
        "max_running_requests": context.settings.queue,
        "internal_states": [dict(context.engine.gauges())],
    }
    return JSONResponse({**_model_info(context), **facts})


def _model_info(context: Context) -> dict[str, Any]:
    """Names in the place of paths, which clients need not know."""
    config = context.model.config
    return {
        "model_path": context.names[0], "tokenizer_path": context.names[0], "is_generation": True,
        "preferred_sampling_params": None, "weight_version": "default", "has_image_understanding": True,
        "has_audio_understanding": False, "model_type": config.raw.get("model_type"),
        "architectures": config.raw.get("architectures"),
    }  # fmt: skip


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> JSONResponse:
    """The text of tokens, as vLLM (`prompt`) and SGLang (`text`) name it."""
    context = context_of(request)
    context.check_model(body.model)
    size, limit = context.model.config.text.vocab_size, context.model.config.text.max_position_embeddings
    if len(body.tokens) > limit:
        raise ApiError(400, f"tokens: {len(body.tokens):,} are more than the context's {limit:,}", param="tokens")
    if beyond := next((token for token in body.tokens if token >= size), None):
        raise ApiError(400, f"tokens: {beyond} is not a token of this model, which has {size:,}", param="tokens")
    decode = context.model.tokenizer.decode
    text = await context.in_thread(lambda: decode(body.tokens, skip_special=body.skip_special_tokens))
    return JSONResponse({"prompt": text, "text": text, **noted()})
