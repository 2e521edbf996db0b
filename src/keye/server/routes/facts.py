"""Small routes that tools ask before they send work: which model, which version, whether it lives."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.template import Segment
from keye.engine.request import Request as Job
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.notes import noted
from keye.server.openai.events import each
from keye.server.openai.schemas_peers import DetokenizeRequest
from keye.server.routes.json_route import JsonRoute
from keye.version import __version__

router = APIRouter(route_class=JsonRoute)

#: Seconds in which a token must come for a model to be called healthy.
_HEALTHY_SECONDS: Final = 20.0


@router.head("/ping", include_in_schema=False)
@router.get("/ping")
async def ping(request: Request) -> Response:
    """Whether the server lives; needs no key."""
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
    """Whether the model still writes: one token is generated."""
    context = context_of(request)
    runtime = context.model.runtime
    params, salt = runtime.sampling_params(max_tokens=1, temperature=0.0), context.salt(owner_of(request))
    job = Job([Segment("text", "1")], params, runtime.attention, ignore_eos=True, salt=salt)
    try:
        async with asyncio.timeout(_HEALTHY_SECONDS), aclosing(each(context, job)) as events:
            async for _ in events:
                pass
    except TimeoutError:
        raise ApiError(503, f"no token came within {_HEALTHY_SECONDS:g} s", code="overloaded", retry=5) from None
    return Response()


@router.get("/get_model_info")
@router.get("/model_info")
async def model_info(request: Request) -> JSONResponse:
    """What is served, in SGLang's words."""
    return JSONResponse(_model_info(context_of(request)))


@router.get("/get_server_info")
@router.get("/server_info")
async def server_info(request: Request) -> JSONResponse:
    """The server and what it serves, in SGLang's words."""
    context = context_of(request)
    facts = {
        "version": __version__,
        "served_model_name": context.name,
        "context_length": context.model.config.text.max_position_embeddings,
        "max_running_requests": context.settings.queue,
        "internal_states": [dict(context.engine.gauges())],
    }
    return JSONResponse({**_model_info(context), **facts})


def _model_info(context: Context) -> dict[str, Any]:
    """Names in the place of paths: where the files of the model lie concerns nobody outside."""
    config = context.model.config
    return {
        "model_path": context.name,
        "tokenizer_path": context.name,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": True,
        "has_audio_understanding": False,
        "model_type": config.raw.get("model_type"),
        "architectures": config.raw.get("architectures"),
    }


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> JSONResponse:
    """The text of tokens, as vLLM (`prompt`) and SGLang (`text`) name it."""
    context = context_of(request)
    context.check_model(body.model)
    size, limit = context.model.config.text.vocab_size, context.model.config.text.max_position_embeddings
    if len(body.tokens) > limit:
        raise ApiError(400, f"tokens: {len(body.tokens):,} are more than the context's {limit:,}", param="tokens")
    if beyond := next((one for one in body.tokens if one >= size), None):
        raise ApiError(400, f"tokens: {beyond} is no token of this model, which has {size:,}", param="tokens")
    decode = context.model.tokenizer.decode
    text = await context.in_thread(lambda: decode(body.tokens, skip_special=body.skip_special_tokens))
    return JSONResponse({"prompt": text, "text": text, **noted()})
