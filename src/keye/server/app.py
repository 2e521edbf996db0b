"""The application: routes, errors, start and end. `create_app` makes it around a loaded model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from fastapi import Depends, FastAPI

from keye.api import Keye
from keye.engine.async_engine import AsyncEngine
from keye.engine.guide import GuideFactory
from keye.errors import KeyeError
from keye.media.source.fetch import FetchPolicy
from keye.server import errors, web
from keye.server.context import Context
from keye.server.edge.audit import Audit
from keye.server.edge.guard import Guard
from keye.server.errors import begin_notes, collect_warnings
from keye.server.library import ServedLibrary
from keye.server.metrics import Metrics
from keye.server.routes import (
    adapters,
    chat,
    completions,
    export,
    files,
    find,
    frames,
    library,
    messages,
    native,
    responses,
    system,
    video,
)
from keye.server.settings import Settings, fetch_policy, guard_settings
from keye.server.stores import FileStore, ResponseStore
from keye.version import __version__

#: Seconds between removals of what has expired.
_SWEEP_SECONDS: Final = 30.0
Gauges = Callable[[], Mapping[str, float]]
log: Final = logging.getLogger("keye.server")
_ROUTERS: Final = (
    chat.router, completions.router, responses.router, files.router, video.router, frames.router, find.router,
    export.router, library.router, system.router, messages.router, native.router, adapters.router,
)  # fmt: skip


def guarded_app(
    model: Keye, settings: Settings, audit: Audit | None = None, *, decode_gauges: Gauges | None = None
) -> Guard:
    """The application behind its guard: what may listen on a socket."""
    guard = guard_settings(settings)
    app = create_app(model, settings, salt=guard.keys.salt, decode_gauges=decode_gauges)
    return Guard(app, guard, audit=audit)


def create_app(
    model: Keye,
    settings: Settings | None = None,
    *,
    salt: Callable[[str], bytes] = str.encode,
    policy: FetchPolicy | None = None,
    decode_gauges: Gauges | None = None,
) -> FastAPI:
    """The ASGI application that serves `model`, without the guard. The engine starts and ends with its lifespan; `salt`
    separates the caches of owners; `policy` says what requests may name, by
    default as in the settings; `decode_gauges` are numbers of a decode service for /metrics, whose names get `decode_`
    in front."""
    settings = settings or Settings()
    for name in model.adapters:
        adapters.check_adapter_name(settings.served_names, model.name, name)
    engine = AsyncEngine(model.engine, most_requests=settings.queue)
    store = FileStore(settings)
    policy = policy or fetch_policy(settings)
    # Downloads are removed with the server's folder, however the server ends.
    policy = replace(policy, limits=replace(policy.limits, folder=store.folder))
    decoding = decode_gauges or dict
    metrics = Metrics(lambda: {**engine.gauges(), **{f"decode_{name}": n for name, n in decoding().items()}})
    try:
        guides = GuideFactory(model.tokenizer, model.runtime.eos_token_ids, model.config.text.vocab_size)
    except KeyeError as error:
        guides = None
        log.warning("%s", error)
    served = None
    if settings.library is not None:
        served = ServedLibrary(model, settings.library, may_manage=not settings.keys or settings.library_manage)
    context = Context(
        model, engine, settings, store, guides, metrics, salt=salt, policy=policy,
        responses=ResponseStore(store, settings.file_seconds), library=served,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        collect_warnings()
        engine.start()
        if served is not None:
            served.start()
        sweeping = asyncio.create_task(_sweep(context))
        try:
            yield
        finally:
            sweeping.cancel()
            context.live.close()
            context.stop_jobs()
            if served is not None:
                await context.in_thread(served.close)
            await engine.drain(settings.drain_seconds)
            engine.close()
            context.threads.shutdown(wait=False, cancel_futures=True)
            context.thumbnails.close()
            store.close()

    app = FastAPI(
        title="keye", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False, dependencies=[Depends(begin_notes)],
    )  # fmt: skip
    app.state.keye = context
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    web.install(app)
    return app


async def _sweep(context: Context) -> None:
    """Removes what has expired, also while there are no requests."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        context.live.sweep()
        await context.in_thread(context.thumbnails.sweep)
        await context.in_thread(context.files.sweep)
        await context.in_thread(context.responses.sweep)
        await context.in_thread(context.indexes.sweep)
