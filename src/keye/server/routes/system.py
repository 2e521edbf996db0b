"""Small routes: what is served, how it feels, and how a text is cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from keye.chat.tokenizer import Tokenizer, check_unicode
from keye.engine.prompt import MOST_COUNTED
from keye.errors import KeyeError
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import error_of_mistake
from keye.server.notes import noted
from keye.server.openai.media_parts import media_of, to_messages
from keye.server.openai.prepare import thinking_of
from keye.server.openai.schemas import TokenizeRequest
from keye.server.routes.json_route import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Whether the server lives; needs no key."""
    return JSONResponse({"status": "ok"})


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The model that is served, under each of its names."""
    context = context_of(request)
    return JSONResponse({"object": "list", "data": [_model(context, name) for name in context.names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> JSONResponse:
    """One model by its name."""
    context = context_of(request)
    context.check_model(name, strict=True)
    return JSONResponse(_model(context, name))


def _model(context: Context, name: str) -> dict[str, Any]:
    config = context.model.config
    facts = {
        "context": config.text.max_position_embeddings,
        "release": config.release.name,
        "attention": context.model.runtime.attention,
        "examples": list(context.model.runtime.generation.examples),
    }
    return {
        "id": name, "object": "model", "created": int(context.started), "owned_by": "keye",
        "max_model_len": config.text.max_position_embeddings, "keye": facts,
    }  # fmt: skip


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
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
    tokenizer = context.model.tokenizer
    if body.prompt is not None:
        return _counted(tokenizer, [(check_unicode(body.prompt), False)], "prompt")
    messages = to_messages(body.messages or (), context.opener(owner))
    if media_of(messages):
        raise ApiError(400, "messages hold media; /v1/media/plan tells what they cost", param="messages")
    thinking = thinking_of(body.chat_template_kwargs, None)
    segments = context.model.render(
        messages, thinking=thinking, tools=body.tools or (),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
    )  # fmt: skip
    parts = [(str(segment.value), segment.kind == "template") for segment in segments]
    return _counted(tokenizer, parts, "messages")


def _counted(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]], field: str) -> list[int]:
    try:
        tokens = tokenizer.encode_parts(parts, most=MOST_COUNTED)
    except KeyeError as error:
        raise error_of_mistake(error, param=field) from None
    if len(tokens) > MOST_COUNTED:
        raise ApiError(400, f"{field}: more than {MOST_COUNTED:,} tokens are not counted; send less", param=field)
    return tokens
