"""The application in front of vLLM: vLLM answers what models answer, keye all that needs no model. Without the guard.

Routes of keye that need its own engine (find, ground, evidence, indexes, live sessions) answer 501.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from keye.api import Keye
from keye.chat.template import template_of
from keye.chat.tokenizer import Tokenizer
from keye.config import load_generation_config, load_model_config, load_processor_config
from keye.engine.async_engine import AsyncEngine
from keye.engine.prompt import PromptBuilder
from keye.media.processor import Processor
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import begin_notes, collect_warnings, install
from keye.server.metrics import Metrics
from keye.server.openai.http import cancel_on_disconnect
from keye.server.replicas.processes import Replica, ReplicaLost
from keye.server.replicas.proxy import Proxy
from keye.server.routes import export, files, find, frames, video
from keye.server.settings import Settings, fetch_policy
from keye.server.stores import FileStore, ResponseStore
from keye.server.vllm.media import needs_engine, prepare_body
from keye.version import __version__

#: What vLLM answers.
_FORWARDED: Final = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/{name:path}", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/models", "/v1/models/{name:path}", "/tokenize", "/detokenize", "/load",
    "/metrics",
)  # fmt: skip
#: Routes of keye's own engine under other paths than the routers here have.
_OWN: Final = (
    "/generate", "/health_generate", "/v1/library", "/v1/library/{name:path}", "/v1/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
)  # fmt: skip
_METHODS: Final = ["GET", "HEAD", "POST", "DELETE"]
_SWEEP_SECONDS: Final = 30.0


class DescribedModel:
    """Stands where routes expect a model: what the small files of a checkpoint tell. All else needs keye's engine."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.config = name, load_model_config(folder)
        self.tokenizer, self.processor = Tokenizer.from_file(folder), Processor(load_processor_config(folder))
        self._prompts = PromptBuilder(self.config, self.tokenizer, self.processor)
        self._template = template_of(self.config.release, load_generation_config(folder).default_system)
        self.measure, self.adapters = self._prompts.measure, ()

    def render(self, messages: Sequence[Any]) -> Any:
        """The prompt of messages by keye's own template."""
        return self._prompts.render(messages, template=self._template)

    def __getattr__(self, name: str) -> Any:
        raise needs_engine("this")


def vllm_app(
    replica: Replica, model: DescribedModel, settings: Settings, *, salt: Callable[[str], bytes] = str.encode
) -> FastAPI:
    """The ASGI application; it starts and ends vLLM with its lifespan. `salt` is that of the guard's keys."""
    proxy, store = Proxy([replica]), FileStore(settings)
    policy = fetch_policy(settings)
    policy = replace(policy, limits=replace(policy.limits, folder=store.folder))
    context = Context(
        cast(Keye, model), cast(AsyncEngine, model), settings, store, None, Metrics(dict), salt=salt, policy=policy,
        responses=ResponseStore(store, settings.file_seconds),
    )  # fmt: skip
    front = _Front(proxy, replica.name, context)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        collect_warnings()
        sweeping = asyncio.create_task(_sweep(store, context))
        try:
            await proxy.start()
            yield
        finally:
            sweeping.cancel()
            context.stop_jobs()
            await proxy.close()
            context.threads.shutdown(wait=False, cancel_futures=True)
            context.thumbnails.close()
            store.close()

    app = FastAPI(title="keye", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  redirect_slashes=False, dependencies=[Depends(begin_notes)])  # fmt: skip
    app.state.keye, app.state.proxy = context, proxy
    install(app)
    for path in ("/health", "/ping"):
        app.add_api_route(path, front.health, methods=["GET", "HEAD"])
    app.add_api_route("/version", front.version, methods=["GET", "HEAD"])
    for path in _OWN:
        app.add_api_route(path, front.reject, methods=_METHODS)
    for path in _FORWARDED:
        app.add_api_route(path, front.answer, methods=_METHODS)
    for router in (files.router, video.router, frames.router, find.router, export.router):
        app.include_router(router)
    return app


class _Front:
    """Sends requests to vLLM; `running` are those under way."""

    def __init__(self, proxy: Proxy, name: str, context: Context) -> None:
        self._proxy, self._name, self._context = proxy, name, context
        self._running = 0

    async def health(self) -> JSONResponse:
        is_ready = self._proxy.health()[self._name]
        return JSONResponse({"status": "ok" if is_ready else "starting", "engine": "vllm"}, 200 if is_ready else 503)

    async def version(self) -> JSONResponse:
        return JSONResponse({"version": __version__, "engine": "vllm"})

    async def reject(self, request: Request) -> Response:
        raise needs_engine(request.url.path)

    async def answer(self, request: Request) -> Response:
        """Any request for vLLM, under the limits of the settings."""
        settings = self._context.settings
        if self._running >= settings.queue:
            raise ApiError(429, "too many requests wait; try again soon", code="overloaded", retry=1)
        if not self._proxy.replicas[self._name].is_ready:  # one that is busy may be late to say that it is healthy
            raise ApiError(503, "vLLM is starting; try again soon", code="no_replica", retry=5)
        end = self._count()
        try:
            content = await self._body(request)
            deadline = asyncio.get_running_loop().time() + settings.request_seconds
            async with asyncio.timeout_at(deadline):
                reply = await cancel_on_disconnect(request, self._proxy.send(self._name, request, content))

            async def close() -> None:
                end()
                await reply.close()

            limited = replace(reply, pieces=_until(deadline, reply.pieces), close=close)
            return await self._proxy.relay(request, self._name, limited)
        except TimeoutError:
            end()
            raise ApiError(503, f"the request took more than {settings.request_seconds:g} s", code="timeout") from None
        except ReplicaLost as lost:
            end()
            raise ApiError(503, f"vLLM gave no answer ({lost}); ask again", code="replica_lost", retry=5) from None
        except BaseException:
            end()
            raise

    def _count(self) -> Callable[[], None]:
        """Counts a request; returns what ends it, which may be called twice."""
        self._running += 1
        is_open = True

        def end() -> None:
            nonlocal is_open
            self._running -= is_open
            is_open = False

        return end

    async def _body(self, request: Request) -> bytes:
        """The body as vLLM takes it, with a name of the model that it knows."""
        content = await request.body()
        if not content:
            return content
        try:
            body = json.loads(content)
        except ValueError:
            raise ApiError(400, "the body is not valid JSON; send one JSON object", code="invalid_json") from None
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object; send one")
        context = context_of(request)
        name = body.get("model")
        context.check_model(name if isinstance(name, str) else None)
        opener, path = context.opener(owner_of(request)), request.url.path
        changed = await context.in_thread(prepare_body, body, path, opener, context.settings)
        return json.dumps({**changed, "model": name if name in context.names else context.names[0]}).encode()


async def _until(deadline: float, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces that come before the deadline; `ReplicaLost` where there are more."""
    try:
        async with asyncio.timeout_at(deadline):
            async for piece in pieces:
                yield piece
    except TimeoutError:
        raise ReplicaLost("the time of the request is over") from None


async def _sweep(store: FileStore, context: Context) -> None:
    """Removes what has expired."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await context.in_thread(store.sweep)
        await context.in_thread(context.thumbnails.sweep)


def facts(settings: Settings, names: Sequence[str], ranks: int) -> Mapping[str, str]:
    """What the start-up summary says."""
    return {
        "engine": f"vLLM on {ranks} rank{'s' if ranks > 1 else ''}",
        "model": ", ".join(names),
        "keys": f"{len(settings.keys)} accepted" if settings.keys else "none needed: only this machine can connect",
        "addresses": ", ".join(settings.allow_urls) or "none are fetched; upload files or send data: URLs",
    }
