"""Runs the application in uvicorn until SIGTERM or Ctrl-C, and says at start-up what holds."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import uvicorn

from keye.api import Keye
from keye.media.decode.confinement import held
from keye.server.app import guarded_app
from keye.server.edge.audit import Audit
from keye.server.edge.guard import App, Guard
from keye.server.edge.limits import Limits
from keye.server.edge.policy import guard_settings
from keye.server.edge.protocol import limits_of_system, uvicorn_options
from keye.server.settings import Settings

#: Ends with an error whatever still runs.
Cut = Callable[[], Awaitable[None]]
#: Seconds in which answers that are cut off can say so, before their connections are closed.
_CUT_SECONDS: Final = 5.0


def run_server(
    model: Keye,
    settings: Settings,
    listening: socket.socket,
    audit: Audit | None = None,
    *,
    gauges: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Serves a model on a bound socket; see `_run`. `gauges` are numbers of the decode service for /metrics."""
    app = guarded_app(model, settings, audit, decode_gauges=gauges)
    engine = app.app.state.keye.engine

    async def cut() -> None:
        engine.fail_open()

    _run(app, settings, listening, lambda address: _block(model, settings, address), cut)


def run_app(
    app: App,
    settings: Settings,
    listening: socket.socket,
    rows: Mapping[str, str],
    audit: Audit | None = None,
    *,
    cut: Cut,
) -> None:
    """Serves any application behind the guard in the same way; `rows` tell at start-up what it is. `cut` is called in
    the event loop when the time for what still runs is over: it ends each with an error."""

    def block(address: Any) -> str:
        return "\n".join(f"{name:<10} {value}" for name, value in {"address": _address(address), **rows}.items())

    _run(Guard(app, guard_settings(settings), audit=audit), settings, listening, block, cut)


def _run(app: App, settings: Settings, listening: socket.socket, block: Callable[[Any], str], cut: Cut) -> None:
    """SIGTERM stops listening, lets running requests end for `drain_seconds`, ends the others by `cut`, and returns."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds + _CUT_SECONDS),
        backlog=2048,
        **uvicorn_options(limits_of_system(Limits())),
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it once more when it is done
    try:
        _Server(config, block, settings.drain_seconds, cut).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Prints the start-up block when requests are taken, and calls `cut` when the time to end them is over."""

    def __init__(self, config: uvicorn.Config, block: Callable[[Any], str], seconds: float, cut: Cut) -> None:
        super().__init__(config)
        self._block, self._seconds, self._cut = block, seconds, cut

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.create_task(self._cut_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def _cut_in_time(self) -> None:
        await asyncio.sleep(self._seconds)
        await self._cut()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is here stays: searching it for rubbish again and again would stop the server for a tenth of a second.
        gc.collect()
        gc.freeze()
        if self.started and sockets:
            print(self._block(sockets[0].getsockname()), flush=True)


def _block(model: Keye, settings: Settings, address: Any) -> str:
    return f"{start_block(model, settings, address)}\n{'sandbox':<10} {_confined()}"


def _address(address: Any) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"


def start_block(model: Keye, settings: Settings, address: Any) -> str:
    """What someone who starts the server wants to know: where it is, what it serves, and which limits hold."""
    config = model.config
    keys = f"{len(settings.keys)} of them may ask" if settings.keys else "none needed: only this machine can ask"
    urls = ", ".join(settings.allow_urls) or "none are fetched; upload files or send data: URLs"
    names = ", ".join(settings.served_names) or model.name
    rows = {
        "address": _address(address),
        "model": f"{names}, Keye-VL {config.generation}, {model.attention} attention",
        "context": f"{config.text.max_position_embeddings:,} tokens",
        "keys": keys,
        "addresses": urls,
        "uploads": f"{_size(settings.upload_bytes)} each, {_size(settings.stored_bytes)} in all, "
        f"kept for {settings.file_seconds / 3600:g} h",
        "requests": f"{settings.queue} at once, {settings.request_seconds:g} s each",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def _confined() -> str:
    """Which limits of the decode workers hold on this system."""
    try:
        return held().sentence()
    except RuntimeError as error:
        return f"decode workers cannot start: {error}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:g} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:g} MiB"
